//! Golden bytes of each command as docs/PROTOCOL.md has it, and properties of encoding and decoding.

use proptest::prelude::*;

use super::*;
use crate::message::tests::hex;

const FILE: FileHandle = FileHandle(0x4433_2211);

#[track_caller]
fn golden(command: Command<'_>, text: &str) {
    let bytes = hex(text);
    let mut encoded = Vec::new();
    command.encode(&mut encoded);
    assert_eq!(encoded, bytes, "encoded: {encoded:02x?}");
    assert_eq!(Command::decode(&bytes), Ok(command));
}

#[test]
fn an_open_has_these_bytes() {
    let flags = OPEN_READ | OPEN_WRITE | OPEN_CREATE | OPEN_NOFOLLOW;
    golden(
        Command::Open { flags, mode: 0o644, path: b"/data/a" },
        "01 00 00 00  07 01 00 00  a4 01 00 00  07 00 00 00
         2f 64 61 74 61 2f 61 00",
    );
    golden(
        Command::Open { flags: OPEN_READ, mode: 0, path: b"/data/ab" },
        "01 00 00 00  01 00 00 00  00 00 00 00  08 00 00 00
         2f 64 61 74 61 2f 61 62",
    );
}

#[test]
fn an_outcome_and_its_answer_have_these_bytes() {
    let ids = [0x0001_0002, 0x0403_0201, 7].map(U32::new);
    golden(
        Command::Outcome { ids: &ids },
        "0b 00 03 00 00 00 00 00  02 00 01 00 01 02 03 04  07 00 00 00 00 00 00 00",
    );
    golden(Command::Outcome { ids: &[] }, "0b 00 00 00 00 00 00 00");
    let bytes = hex(
        "02 00 01 00  00 00 00 00  00 00 00 00 00 00 00 00  01 02 03 04  00 00 00 01  00 10 00 00 00 00 00 00
         07 00 00 00  1c 00 03 01  00 02 00 00 00 00 00 00",
    );
    let failed = Status::storage(libc::ENOSPC);
    let outcomes = [
        RequestOutcome::never(0x0001_0002),
        RequestOutcome::done(0x0403_0201, Status::OK, 4096),
        RequestOutcome::done(7, failed, 512),
    ];
    assert_eq!((RequestOutcome::decode(&bytes), outcomes.as_bytes()), (Ok(&outcomes[..]), &bytes[..]));
    assert_eq!(outcomes.map(|outcome| outcome.id()), [0x0001_0002, 0x0403_0201, 7]);
    let answers = [Ok(None), Ok(Some((Status::OK, 4096))), Ok(Some((failed, 512)))];
    assert_eq!(outcomes.map(|outcome| outcome.answer()), answers);
    assert_eq!(RequestOutcome::decode(&bytes[..40]), Err(Violation::Length));
    // A state that does not exist; a class without an errno; an errno that is too large; a result of nothing.
    for (at, value) in [(7, 2), (22, 3), (37, 0x10), (8, 1)] {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        let outcomes = RequestOutcome::decode(&bytes).unwrap();
        let wrong = outcomes.iter().filter(|outcome| outcome.answer() == Err(Violation::Field)).count();
        assert_eq!(wrong, 1, "byte {at}");
    }
}

#[test]
fn a_reopen_has_these_bytes() {
    let identity = std::array::from_fn(|n| n as u8);
    golden(
        Command::Reopen { flags: OPEN_READ | OPEN_DIRECT, file: FILE, identity, path: b"/data/a" },
        "0c 00 00 00  21 00 00 00  11 22 33 44  07 00 00 00
         00 01 02 03 04 05 06 07  08 09 0a 0b 0c 0d 0e 0f  2f 64 61 74 61 2f 61 00",
    );
}

#[test]
fn what_is_recorded_is_what_must_not_run_twice() {
    let recorded =
        OPERATIONS.iter().filter(|operation| operation.is_recorded).map(|operation| operation.opcode);
    use Opcode::*;
    let on_files = [Open, Write, Discard, WriteZeroes, Allocate];
    let on_names = [Put, Mkdir, Rmdir, Unlink, Rename, Link, Symlink, SetAttributes, Truncate, SetXattr];
    assert_eq!(recorded.collect::<Vec<_>>(), [&on_files[..], &on_names[..], &[Copy]].concat());
}

#[test]
fn each_flag_of_an_open_is_this_bit() {
    let flags = [
        OPEN_READ,
        OPEN_WRITE,
        OPEN_CREATE,
        OPEN_EXCLUSIVE,
        OPEN_TRUNCATE,
        OPEN_DIRECT,
        OPEN_SYNC,
        OPEN_DSYNC,
        OPEN_NOFOLLOW,
    ];
    assert_eq!(flags, std::array::from_fn(|bit| 1 << bit));
}

#[test]
fn every_other_command_has_these_bytes() {
    let (offset, length) = (0x0011_2233_4455_6677, 0x1000);
    golden(Command::Close(FILE), "02 00 00 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00");
    golden(Command::Stat(FILE), "03 00 00 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00");
    golden(
        Command::Read { file: FILE, offset, length },
        "04 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  00 10 00 00 00 00 00 00",
    );
    golden(
        Command::Write { file: FILE, offset, length },
        "05 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  00 10 00 00 00 00 00 00",
    );
    golden(
        Command::Fsync { file: FILE, data_only: false },
        "06 00 00 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00",
    );
    golden(
        Command::Fsync { file: FILE, data_only: true },
        "06 00 01 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00",
    );
    golden(
        Command::Discard { file: FILE, offset, length: 0x7766_5544_3322_1100 },
        "07 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  00 11 22 33 44 55 66 77",
    );
    golden(
        Command::WriteZeroes { file: FILE, offset, length: u64::MAX },
        "08 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  ff ff ff ff ff ff ff ff",
    );
    golden(
        Command::Cancel { id: 0x8877_6655_4433_2211 },
        "09 00 00 00 00 00 00 00  11 22 33 44 55 66 77 88  00 00 00 00 00 00 00 00",
    );
    golden(
        Command::Allocate { file: FILE, offset, length: u64::MAX, keep_size: false },
        "0a 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  ff ff ff ff ff ff ff ff",
    );
    golden(
        Command::Allocate { file: FILE, offset, length: 4096, keep_size: true },
        "0a 00 01 00 11 22 33 44  77 66 55 44 33 22 11 00  00 10 00 00 00 00 00 00",
    );
}

#[test]
fn a_file_status_has_these_bytes() {
    let bytes = hex(
        "08 07 06 05 04 03 02 01  10 00 00 00 00 00 00 00  2a 00 00 00 00 00 00 00  01 08 00 00 00 00 00 00
         05 00 00 00 00 00 00 00  ff ff ff ff ff ff ff ff  00 ca 9a 3b 00 00 00 00  01 00 00 00 00 00 00 80
         a4 81 00 00  02 00 00 00  e8 03 00 00  e9 03 00 00  00 10 00 00  00 02 00 00
         00 01 02 03 04 05 06 07  08 09 0a 0b 0c 0d 0e 0f  88 77 66 55 44 33 22 11",
    );
    let status = FileStatus::decode(&bytes).unwrap();
    let expected = FileStatus {
        size: U64::new(0x0102_0304_0506_0708),
        blocks: U64::new(16),
        inode: U64::new(42),
        device: U64::new(0x801),
        rdevice: U64::new(5),
        accessed_ns: I64::new(-1),
        modified_ns: I64::new(1_000_000_000),
        changed_ns: I64::new(i64::MIN + 1),
        mode: U32::new(0o100_644),
        links: U32::new(2),
        uid: U32::new(1000),
        gid: U32::new(1001),
        block_bytes: U32::new(4096),
        direct_align: U32::new(512),
        identity: std::array::from_fn(|n| n as u8),
        verifier: U64::new(0x1122_3344_5566_7788),
    };
    assert_eq!((status, status.as_bytes()), (expected, &bytes[..]));
    assert_eq!(FileStatus::decode(&bytes[..88]), Err(Violation::Length));
}

#[test]
fn each_command_that_makes_no_sense_is_refused_for_its_own_reason() {
    let open = "01 00 00 00  01 00 00 00  00 00 00 00  07 00 00 00  2f 64 61 74 61 2f 61 00";
    let read = "04 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  00 10 00 00 00 00 00 00";
    let close = "02 00 00 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00";
    // One byte of a good command, changed.
    for (what, good, at, value, violation) in [
        ("opcode 0", read, 0, 0, Violation::Field),
        ("opcode 35", read, 0, 35, Violation::Field),
        ("opcode 260", read, 1, 1, Violation::Field),
        ("a read with a flag", read, 2, 1, Violation::Reserved),
        ("a read of 4 GiB", read, 20, 1, Violation::Length),
        ("a close with a flag", close, 2, 1, Violation::Reserved),
        ("a close with an offset", close, 8, 1, Violation::Reserved),
        ("a close with a length", close, 23, 1, Violation::Reserved),
        ("an open with a reserved byte", open, 2, 1, Violation::Reserved),
        ("an open with an unknown flag", open, 5, 2, Violation::Reserved),
        ("an open neither to read nor to write", open, 4, 4, Violation::Field),
        ("an open with a mode beyond 07777", open, 9, 0x10, Violation::Field),
        ("an open of no path", open, 12, 0, Violation::Length),
        ("an open with a length beyond its path", open, 12, 9, Violation::Length),
        ("an open with an endless length", open, 15, 0xff, Violation::Length),
        ("an open with padding that is not zero", open, 23, 1, Violation::Reserved),
        ("an open with a zero within its path", open, 18, 0, Violation::Field),
    ] {
        let mut bytes = hex(good);
        bytes[at] = value;
        assert_eq!(Command::decode(&bytes), Err(violation), "{what}");
    }
    let fsync = hex("06 00 02 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00");
    assert_eq!(Command::decode(&fsync), Err(Violation::Reserved));
    let allocate = hex("0a 00 02 00 11 22 33 44  00 00 00 00 00 00 00 00  00 10 00 00 00 00 00 00");
    assert_eq!(Command::decode(&allocate), Err(Violation::Reserved));
    let outcome = "0b 00 03 00 00 00 00 00  02 00 01 00 01 02 03 04  07 00 00 00 00 00 00 00";
    let reopen = "0c 00 00 00  21 00 00 00  11 22 33 44  07 00 00 00
                  00 01 02 03 04 05 06 07  08 09 0a 0b 0c 0d 0e 0f  2f 64 61 74 61 2f 61 00";
    for (what, good, at, value, violation) in [
        ("an outcome of more ids than it has", outcome, 2, 5, Violation::Length),
        ("an outcome of fewer ids than it has", outcome, 2, 1, Violation::Length),
        ("an outcome of too many ids", outcome, 3, 2, Violation::Length),
        ("an outcome with a reserved byte", outcome, 5, 1, Violation::Reserved),
        ("an outcome with padding that is not zero", outcome, 21, 1, Violation::Reserved),
        ("a reopen with a reserved byte", reopen, 3, 1, Violation::Reserved),
        ("a reopen that creates", reopen, 4, 5, Violation::Reserved),
        ("a reopen that truncates", reopen, 4, 0x11, Violation::Reserved),
        ("a reopen neither to read nor to write", reopen, 4, 0x20, Violation::Field),
        ("a reopen of no path", reopen, 12, 0, Violation::Length),
        ("a reopen with a zero within its path", reopen, 34, 0, Violation::Field),
    ] {
        let mut bytes = hex(good);
        bytes[at] = value;
        assert_eq!(Command::decode(&bytes), Err(violation), "{what}");
    }
    let copy = "20 00 00 00 11 22 33 44  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00
                05 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00";
    for at in [2, 3, 28, 31] {
        let mut bytes = hex(copy);
        bytes[at] = 1;
        assert_eq!(Command::decode(&bytes), Err(Violation::Reserved), "byte {at} of a copy");
    }
    for len in [24, 32, 39, 41, 48] {
        let mut bytes = hex(copy);
        bytes.resize(len, 0);
        assert_eq!(Command::decode(&bytes), Err(Violation::Length), "a copy of {len} bytes");
    }
    for (opcode, flag) in [(33, 4), (34, 4)] {
        let mut bytes = hex(close);
        (bytes[0], bytes[2]) = (opcode, flag);
        assert_eq!(Command::decode(&bytes), Err(Violation::Reserved), "opcode {opcode}, flag {flag}");
    }
    let cancel = hex("09 00 00 00 01 00 00 00  11 22 33 44 55 66 77 88  00 00 00 00 00 00 00 00");
    assert_eq!(Command::decode(&cancel), Err(Violation::Reserved));
    for len in [0, 1, 8, 23, 25, 32] {
        let mut bytes = hex(read);
        bytes.resize(len, 0);
        assert_eq!(Command::decode(&bytes), Err(Violation::Length), "{len} bytes");
    }
}

#[test]
fn the_longest_paths_and_most_ids_fit_into_a_message() {
    let path = &vec![b'p'; PATH_BYTES_MAX];
    for command in [
        Command::Open { flags: OPEN_READ, mode: 0, path },
        Command::Reopen { flags: OPEN_READ, file: FILE, identity: [1; 16], path },
        Command::Outcome { ids: &[U32::new(1); OUTCOMES_MAX] },
    ] {
        let mut bytes = Vec::new();
        command.encode(&mut bytes);
        assert!(bytes.len() <= crate::message::BODY_BYTES_MAX);
        assert_eq!(Command::decode(&bytes), Ok(command));
    }
    assert!(size_of::<[RequestOutcome; OUTCOMES_MAX]>() <= crate::message::BODY_BYTES_MAX);
}

/// docs/PROTOCOL.md's table, as [`OPERATIONS`] has it: opcode, name, fields, flags, direction, class, group,
/// and whether it is recorded.
#[test]
fn the_documented_operations_are_those_of_the_table() {
    let document = include_str!("../../docs/PROTOCOL.md");
    let rows = document.lines().skip_while(|line| !line.starts_with("| opcode | command |")).skip(2);
    let documented: Vec<_> = rows
        .take_while(|line| line.starts_with('|'))
        .map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            let uses = |word: &str| cells[3].split(&[',', ' '][..]).any(|used| used == word);
            let bits =
                cells[3].split("flags bit ").skip(1).map(|text| text[..1].parse::<u16>().expect("a bit"));
            (
                cells[1].parse::<u16>().expect("an opcode"),
                cells[2],
                match cells[3] {
                    "own layout, below" => Layout::Own,
                    _ if uses("path") => Layout::Path(PathFields {
                        length: uses("length"),
                        mode: uses("mode"),
                        time: uses("modified"),
                        other: uses("other"),
                    }),
                    _ => Layout::Fields(Fields {
                        file: uses("file"),
                        offset: uses("offset"),
                        length: uses("length"),
                    }),
                },
                bits.map(|bit| 1 << bit).sum::<u16>(),
                cells[4],
                cells[5],
                cells[6],
                cells[7],
            )
        })
        .collect();
    let table: Vec<_> = OPERATIONS
        .iter()
        .map(|operation| {
            let direction = match operation.direction {
                Direction::None => "none",
                Direction::ToClient => "to client",
                Direction::ToServer => "to server",
            };
            let class = if operation.class == OperationClass::Control { "control" } else { "data" };
            let recorded = if operation.is_recorded { "yes" } else { "no" };
            let Operation { opcode, name, layout, flags, group, .. } = *operation;
            (opcode as u16, name, layout, flags, direction, class, group.name(), recorded)
        })
        .collect();
    assert_eq!(documented, table);
}

#[test]
fn the_documented_groups_have_the_feature_bits_of_their_operations() {
    let document = include_str!("../../docs/PROTOCOL.md");
    let rows = document.lines().skip_while(|line| !line.starts_with("| bit | group |")).skip(2);
    let documented: Vec<_> = rows
        .take_while(|line| line.starts_with('|'))
        .map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[2], 1 << cells[1].parse::<u32>().expect("a bit"))
        })
        .collect();
    for (group, feature) in &documented {
        let has_operations = OPERATIONS.iter().any(|operation| operation.group.name() == *group);
        assert!(has_operations && OPERATION_FEATURES & feature != 0, "{group}");
    }
    for operation in &OPERATIONS {
        let feature = operation.group.feature();
        let is_basic = operation.group == OperationGroup::Basic;
        assert_eq!(is_basic, !documented.contains(&(operation.group.name(), feature)), "{}", operation.name);
        assert_eq!((operation.is_granted(0), operation.is_granted(feature)), (is_basic, true));
        let why = operation.why_not_granted(!feature);
        assert!(why.is_none_or(|text| text.contains(operation.name)), "{}", operation.name);
    }
}

#[test]
fn an_operation_accepts_the_fields_of_its_row_and_no_others() {
    for operation in &OPERATIONS {
        let Layout::Fields(Fields { file, offset, length }) = operation.layout else { continue };
        for (at, is_used, what) in [
            (2, operation.flags != 0, "flags"),
            (4, file, "file"),
            (8, offset, "offset"),
            (16, length, "length"),
        ] {
            let mut bytes = [0; 24];
            bytes[0] = operation.opcode as u8;
            bytes[at] = 1;
            let expected = if is_used { None } else { Some(Violation::Reserved) };
            assert_eq!(Command::decode(&bytes).err(), expected, "{} with {what}", operation.name);
        }
    }
}

/// A command of each operation on a path, with everything that it may have.
fn path_commands() -> impl Iterator<Item = PathCommand<'static>> {
    let on_path = |operation: &&Operation| matches!(operation.layout, Layout::Path(_));
    OPERATIONS.iter().filter(on_path).map(|operation| {
        let Layout::Path(fields) = operation.layout else { unreachable!("filtered") };
        let removes = operation.opcode == Opcode::SetXattr;
        PathCommand {
            flags: operation.flags & !if removes { FLAG_REMOVE } else { 0 },
            mode: if fields.mode { 0o644 } else { 0 },
            length: if fields.length { 0x1000 } else { 0 },
            modified_ns: if fields.time { -2 } else { 0 },
            other: if fields.other { b"user.a" } else { b"" },
            ..PathCommand::new(operation.opcode, b"/d/a")
        }
    })
}

#[test]
fn commands_on_paths_have_these_bytes() {
    let put = PathCommand {
        flags: FLAG_FSYNC | FLAG_SET_TIME,
        mode: 0o644,
        length: 0x1000,
        modified_ns: 0x0011_2233_4455_6677,
        ..PathCommand::new(Opcode::Put, b"/data/a")
    };
    golden(
        Command::Path(put),
        "0f 00 0c 00  a4 01 00 00  00 10 00 00 00 00 00 00
         77 66 55 44 33 22 11 00  07 00 00 00 00 00 00 00  2f 64 61 74 61 2f 61 00",
    );
    let rename = PathCommand {
        flags: FLAG_NO_REPLACE,
        other: b"/data/b",
        ..PathCommand::new(Opcode::Rename, b"/data/a")
    };
    golden(
        Command::Path(rename),
        "15 00 02 00  00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
         07 00 07 00 00 00 00 00  2f 64 61 74 61 2f 61 2f  64 61 74 61 2f 62 00 00",
    );
    golden(
        Command::ListNext { listing: 0x8877_6655_4433_2211, is_odd: true, length: 0x1000 },
        "11 00 01 00 00 00 00 00  11 22 33 44 55 66 77 88  00 10 00 00 00 00 00 00",
    );
    golden(
        Command::Truncate { file: FILE, size: 0x0011_2233_4455_6677 },
        "1a 00 00 00 11 22 33 44  00 00 00 00 00 00 00 00  77 66 55 44 33 22 11 00",
    );
    golden(
        Command::Extents { file: FILE, offset: 1, length: 2 },
        "1c 00 00 00 11 22 33 44  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00",
    );
}

#[test]
fn copies_checksums_and_locks_have_these_bytes() {
    golden(
        Command::Copy {
            source: FILE,
            offset: 0x0011_2233_4455_6677,
            length: u64::MAX,
            destination: FileHandle(0x8877_6655),
            destination_offset: 0x1000,
        },
        "20 00 00 00 11 22 33 44  77 66 55 44 33 22 11 00  ff ff ff ff ff ff ff ff
         55 66 77 88 00 00 00 00  00 10 00 00 00 00 00 00",
    );
    golden(
        Command::Checksum { file: FILE, offset: 1, length: 2, checksum: FLAG_BLAKE3 },
        "21 00 02 00 11 22 33 44  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00",
    );
    golden(
        Command::Lock { file: FILE, lock: FLAG_LOCK_SHARED },
        "22 00 01 00 11 22 33 44  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00",
    );
}

#[test]
fn a_command_on_a_path_has_what_its_operation_uses_and_nothing_else() {
    for command in path_commands() {
        let name = command.opcode.operation().name;
        let mut good = Vec::new();
        Command::Path(command).encode(&mut good);
        assert_eq!(Command::decode(&good), Ok(Command::Path(command)), "{name}");
        let layout = command.opcode.operation().layout;
        let Layout::Path(PathFields { length, mode, time, other }) = layout else { unreachable!() };
        let unused = [(4, mode), (8, length), (16, time), (26, other)];
        let unused = unused.iter().filter(|(_, is_used)| !is_used).map(|&(at, _)| (at, 1));
        for (at, value) in unused.chain([(3, 0x80), (28, 1), (good.len() - 1, 1), (24, 0), (25, 0x11)]) {
            let mut bytes = good.clone();
            bytes[at] = value;
            // A name that is longer by one takes a byte of the padding, which is zero.
            assert!(Command::decode(&bytes).is_err(), "{name}: byte {at} is {value}");
        }
        for (at, value) in [(5, 0x10), (32, 0)] {
            let mut bytes = good.clone();
            bytes[at] = value;
            assert!(Command::decode(&bytes).is_err(), "{name}: byte {at} is {value}");
        }
        if command.opcode.operation().direction != Direction::None {
            let mut bytes = good.clone();
            bytes[12] = 1;
            assert_eq!(Command::decode(&bytes), Err(Violation::Length), "{name} of 4 GiB");
        }
    }
    let set = |flags, length, mode, modified_ns| {
        let fields = PathCommand::new(Opcode::SetAttributes, b"/d/a");
        let mut bytes = Vec::new();
        Command::Path(PathCommand { flags, length, mode, modified_ns, ..fields }).encode(&mut bytes);
        Command::decode(&bytes).err()
    };
    assert_eq!(set(FLAG_SET_SIZE, 1 << 40, 0, 0), None);
    assert_eq!(set(FLAG_SET_MODE, 1, 0o644, 0), Some(Violation::Reserved), "a size that is not to be set");
    assert_eq!(set(FLAG_SET_SIZE, 1, 0o644, 0), Some(Violation::Reserved), "a mode that is not to be set");
    assert_eq!(set(0, 0, 0, 1), Some(Violation::Reserved), "a time that is not to be set");
}

#[test]
fn entries_of_a_directory_are_read_as_they_were_written() {
    let names: [&[u8]; 4] = [b"a", b"exactly8", &[0xff; 255], b"...."];
    let all: Vec<_> = names
        .iter()
        .zip(1..)
        .map(|(&name, n)| DirectoryEntry {
            name,
            mode: 0o100_644,
            size: 1 << (10 * n),
            modified_ns: -(n as i64),
            inode: n,
            has_status: n != 2,
        })
        .collect();
    let mut bytes = vec![0xee; 1024];
    let mut at = 0;
    for entry in &all {
        at += push_entry(entry, &mut bytes[at..]).unwrap();
    }
    let bytes = &bytes[..at];
    assert_eq!(entries(bytes).collect::<Result<Vec<_>, _>>(), Ok(all.clone()));
    assert_eq!(push_entry(&all[0], &mut [0; 39]), None, "there is no room");
    for (what, at, value) in [
        ("no name", 28, 0),
        ("a name beyond the end", 29, 0x70),
        ("a name of more than 255 bytes", 29, 1),
        ("an unknown flag", 30, 2),
        ("padding that is not zero", 39, 1),
        ("a slash", 32, b'/'),
        ("a zero byte", 32, 0),
        (".", 32, b'.'),
    ] {
        let mut bytes = bytes.to_vec();
        bytes[at] = value;
        assert!(entries(&bytes).any(|entry| entry.is_err()), "{what}");
    }
    assert!(entries(&bytes[..at - 1]).last().unwrap().is_err());
}

#[test]
fn extents_are_in_order_and_do_not_touch() {
    let extents = |list: &[(u64, u64)]| {
        let list: Vec<_> = list
            .iter()
            .map(|&(offset, length)| Extent { offset: offset.into(), length: length.into() })
            .collect();
        Extent::decode(list.as_bytes()).map(<[Extent]>::len)
    };
    assert_eq!(extents(&[]), Ok(0));
    assert_eq!(extents(&[(0, 1), (2, 1), (i64::MAX as u64 - 1, 1)]), Ok(3));
    for wrong in
        [&[(0, 0)][..], &[(0, 2), (2, 1)], &[(4, 1), (0, 1)], &[(1, i64::MAX as u64)], &[(u64::MAX, 2)]]
    {
        assert_eq!(extents(wrong), Err(Violation::Field), "{wrong:?}");
    }
    assert_eq!(Extent::decode(&[0; 8]), Err(Violation::Length));
    assert!(size_of::<[Extent; Extent::COUNT_MAX]>() <= crate::message::BODY_BYTES_MAX);
}

fn any_command() -> impl Strategy<Value = (u8, u32, u64, u64, Vec<u8>)> {
    let opcodes = 1..=OPERATIONS.len() as u8;
    (opcodes, any::<u32>(), any::<u64>(), any::<u64>(), prop::collection::vec(1u8.., 1..=300))
}

fn command((opcode, file, offset, length, path): &(u8, u32, u64, u64, Vec<u8>)) -> Command<'_> {
    let (file, offset, length) = (FileHandle(*file), *offset, *length);
    match opcode {
        1 => Command::Open {
            flags: (length as u32 & OPEN_FLAGS) | OPEN_READ,
            mode: offset as u32 & 0o7777,
            path,
        },
        2 => Command::Close(file),
        3 => Command::Stat(file),
        4 => Command::Read { file, offset, length: length as u32 },
        5 => Command::Write { file, offset, length: length as u32 },
        6 => Command::Fsync { file, data_only: offset % 2 == 1 },
        7 => Command::Discard { file, offset, length },
        8 => Command::WriteZeroes { file, offset, length },
        9 => Command::Cancel { id: offset },
        10 => Command::Allocate { file, offset, length, keep_size: offset % 2 == 1 },
        11 => Command::Outcome {
            ids: <[U32]>::ref_from_bytes(&path[..path.len() & !3]).expect("a multiple of their size"),
        },
        17 => Command::ListNext { listing: offset, is_odd: offset % 2 == 1, length: length as u32 },
        26 => Command::Truncate { file, size: length },
        28 => Command::Extents { file, offset, length },
        32 => Command::Copy {
            source: file,
            offset,
            length,
            destination: FileHandle(!file.0),
            destination_offset: offset ^ length,
        },
        33 => Command::Checksum { file, offset, length, checksum: offset as u16 & 3 },
        34 => Command::Lock { file, lock: offset as u16 & 3 },
        13.. => {
            let all = path_commands().find(|command| command.opcode as u8 == *opcode);
            let all = all.expect("every other one is on a path");
            let given = |flag: u16| offset as u16 & all.flags & flag != 0;
            let may = |flag: u16| all.opcode.operation().flags & flag == 0 || given(flag);
            let data = all.opcode.operation().direction != Direction::None;
            let length = if data { length & 0xffff_ffff } else { length };
            let (path, other) = path.split_at(path.len().div_ceil(2));
            Command::Path(PathCommand {
                flags: offset as u16 & all.flags,
                mode: if may(FLAG_SET_MODE) && all.mode != 0 { file.0 & 0o7777 } else { 0 },
                length: if may(FLAG_SET_SIZE) && all.length != 0 { length } else { 0 },
                modified_ns: if may(FLAG_SET_TIME) && all.modified_ns != 0 { offset as i64 } else { 0 },
                path,
                other: match all.other {
                    b"" => b"",
                    _ if other.is_empty() => b"x",
                    _ => other,
                },
                ..all
            })
        }
        _ => Command::Reopen {
            flags: (length as u32 & OPEN_FLAGS & !OPEN_ONCE_FLAGS) | OPEN_READ,
            file,
            identity: std::array::from_fn(|n| n as u8 ^ offset as u8),
            path,
        },
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(sample in any_command()) {
        let command = command(&sample);
        let mut bytes = Vec::new();
        command.encode(&mut bytes);
        prop_assert!(bytes.len().is_multiple_of(8));
        prop_assert_eq!(Command::decode(&bytes), Ok(command));
        prop_assert_eq!(command.opcode() as u8, sample.0);
    }

    #[test]
    fn what_is_decoded_is_encoded_as_it_was(
        bytes in prop::collection::vec(any::<u8>(), 24),
        opcode in 0u16..36,
        sparse: bool,
    ) {
        let mut bytes = bytes;
        bytes[..2].copy_from_slice(&opcode.to_le_bytes());
        if sparse {
            bytes[2..4].fill(0);
            bytes[20..].fill(0);
        }
        if let Ok(command) = Command::decode(&bytes) {
            let mut again = Vec::new();
            command.encode(&mut again);
            prop_assert_eq!(again, bytes);
        }
    }

    #[test]
    fn nothing_makes_decoding_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), opcode in 0u8..37) {
        let _ = Command::decode(&bytes);
        let _ = FileStatus::decode(&bytes);
        let mut likely = bytes;
        for (at, value) in [(0, opcode), (1, 0), (2, 0), (3, 0), (13, 0), (14, 0), (15, 0)] {
            if let Some(byte) = likely.get_mut(at) {
                *byte = value;
            }
        }
        let _ = Command::decode(&likely);
    }
}

#[test]
fn what_is_recorded_is_told_from_the_encoded_command() {
    for operation in &OPERATIONS {
        let mut command = vec![0; 24];
        command[..2].copy_from_slice(&(operation.opcode as u16).to_le_bytes());
        assert_eq!(Opcode::is_recorded_on_wire(&command), operation.is_recorded, "{}", operation.name);
        command[1] = 1;
        assert!(!Opcode::is_recorded_on_wire(&command), "it is another operation's number");
    }
    assert!(!Opcode::is_recorded_on_wire(&[]));
}
