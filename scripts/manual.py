#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Makes the manual pages of libraio's calls from the comments of libraio/include/libraio.h.

  scripts/manual.py             writes docs/man/raio_*.3
  scripts/manual.py --check     whether they are what it would write; each call is in one, and in libraio(3);
                                every .Xr to a page of ours leads to one; the examples compile

The header is the only place where a call is described. A comment before a prototype begins with
`name[, name] - what it does`. Its paragraph `Returns ...` has the errors behind `errno:`, each with the
reason in brackets. Which calls share a page, and which structures it shows, is in PAGES.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAN = ROOT / "docs/man"
HEADER = ROOT / "libraio/include/libraio.h"
EXAMPLES = ROOT / "libraio/examples/manual"

# Page: what it is about, its calls, the structures and constants that it shows, and other pages to see.
PAGES = {
    "raio_start": ("begin and end a session", "start connect stop", "raio_options RAIO_OPT_", "raio_open raio_setup"),
    "raio_open": ("open and close files", "open open_mode close", "", "raio_pread raio_setup raio_prep_open"),
    "raio_fstat": ("get the status of an open file", "fstat stat_fd", "raio_stat", "raio_stat_path raio_prep_close"),
    "raio_pread": ("read and write, and wait for it", "pread pwrite", "", "raio_fsync raio_submit"),
    "raio_fsync": ("make writes durable; set a file's size", "fsync ftruncate", "", "raio_prep_fsync raio_pread"),
    "raio_extents": ("find the parts of a file that have data", "extents", "raio_extent", "raio_prep_discard"),
    "raio_copy_file_range": (
        "copy within the server, and compute checksums there", "copy_file_range checksum_range",
        "raio_checksum RAIO_CHECKSUM_", "raio_prep_copy_file_range raio_crc32c",
    ),
    "raio_flock": ("lock a file", "flock", "", "raio_prep_copy_file_range raio_open"),
    "raio_stat_path": (
        "get the status of a path or of a file system", "stat_path lstat_path statfs_path", "raio_statfs",
        "raio_fstat raio_prep_open raio_prep_truncate",
    ),
    "raio_get": ("read or replace a small file in one request", "get put", "RAIO_PUT_", "raio_prep_get raio_open"),
    "raio_mkdir": (
        "change and read names of files", "mkdir rmdir unlink rename link symlink readlink", "RAIO_RENAME_",
        "raio_prep_mkdir raio_opendir",
    ),
    "raio_truncate": ("set attributes of a path", "truncate chmod utimens", "RAIO_PATH_", "raio_prep_truncate"),
    "raio_getxattr": (
        "extended attributes", "getxattr setxattr listxattr removexattr", "RAIO_XATTR_", "raio_prep_getxattr",
    ),
    "raio_opendir": ("list a directory", "opendir readdir closedir", "raio_dirent", "raio_prep_opendir"),
    "raio_setup": ("create and free a context", "setup destroy", "", "raio_submit raio_getevents raio_start"),
    "raio_submit": (
        "submit operations", "submit", "raio_iocb raio_iocb_common RAIO_IOCB_ RAIO_CMD_",
        "raio_getevents raio_prep_pread raio_setup raio_cancel",
    ),
    "raio_getevents": (
        "collect completions", "getevents release", "raio_event RAIO_RES2_", "raio_submit raio_poll_fd raio_errmsg",
    ),
    "raio_cancel": ("cancel an operation", "cancel", "", "raio_submit raio_getevents raio_set_timeout"),
    "raio_poll_fd": ("wait for completions with poll(2)", "poll_fd", "", "raio_getevents raio_set_eventfd"),
    "raio_reg_mr": (
        "memory for zero-copy I/O over RDMA", "reg_mr dereg_mr alloc free", "", "raio_prep_pread raio_setup",
    ),
    "raio_get_stats": ("counters of a context", "get_stats", "raio_stats", "raio_setup"),
    "raio_errmsg": ("why a call or an operation failed", "errmsg event_errmsg", "", "raio_getevents"),
    "raio_crc32c": ("compute a checksum", "crc32c", "", "raio_set_crc raio_copy_file_range"),
    "raio_abi_version": ("the version of the library", "abi_version", "RAIO_ABI_", ""),
    "raio_prep_pread": (
        "prepare a read or a write", "prep_pread prep_pwrite prep_preadv prep_pwritev", "",
        "raio_submit raio_reg_mr raio_set_crc",
    ),
    "raio_prep_fsync": ("prepare an fsync", "prep_fsync", "", "raio_submit raio_fsync"),
    "raio_prep_discard": (
        "prepare to deallocate, zero or reserve a range", "prep_discard prep_write_zeroes prep_allocate", "",
        "raio_submit raio_extents",
    ),
    "raio_prep_close": (
        "prepare to close a file, get its status or set its size", "prep_close prep_stat_fd prep_ftruncate", "",
        "raio_submit raio_open raio_fstat raio_fsync",
    ),
    "raio_prep_copy_file_range": (
        "prepare a copy, a checksum or a lock on the server", "prep_copy_file_range prep_checksum prep_flock",
        "raio_copy_args raio_checksum RAIO_CHECKSUM_", "raio_submit raio_copy_file_range raio_flock",
    ),
    "raio_prep_open": (
        "prepare to open a file, or to get the status of a path", "prep_open prep_stat_path", "raio_path_args",
        "raio_submit raio_open raio_stat_path",
    ),
    "raio_prep_get": (
        "prepare to read or replace a small file in one request", "prep_get prep_put", "raio_path_args RAIO_PUT_",
        "raio_submit raio_get",
    ),
    "raio_prep_mkdir": (
        "prepare a change of names",
        "prep_mkdir prep_rmdir prep_unlink prep_rename prep_link prep_symlink prep_readlink",
        "raio_path_args RAIO_RENAME_", "raio_submit raio_mkdir",
    ),
    "raio_prep_truncate": (
        "prepare to set attributes of a path, or to get the status of a file system",
        "prep_truncate prep_chmod prep_utimens prep_statfs_path", "raio_path_args RAIO_SET_",
        "raio_submit raio_truncate raio_stat_path",
    ),
    "raio_prep_getxattr": (
        "prepare for extended attributes", "prep_getxattr prep_setxattr prep_listxattr prep_removexattr",
        "raio_path_args RAIO_XATTR_", "raio_submit raio_getxattr",
    ),
    "raio_prep_opendir": (
        "prepare to list a directory", "prep_opendir prep_readdir", "raio_path_args", "raio_submit raio_opendir",
    ),
    "raio_set_eventfd": ("signal an eventfd for an operation", "set_eventfd", "", "raio_poll_fd raio_getevents"),
    "raio_set_crc": ("protect an operation by checksums", "set_crc", "", "raio_crc32c raio_prep_pread"),
    "raio_set_timeout": ("bound the time of an operation", "set_timeout", "", "raio_cancel raio_getevents"),
}  # fmt: skip

# What an errno means for which the header gives no reason.
ERRORS = {
    "EACCES": "permission denied",
    "EBADF": "the descriptor is not a session or an open file, or the file is not open for this",
    "ECONNREFUSED": "nothing listens at the address",
    "ECONNRESET": "the server is lost, or was restarted meanwhile",
    "EDQUOT": "a quota is used up",
    "EEXIST": "there is something with that name already",
    "EFBIG": "a file may not be that long",
    "EHOSTUNREACH": "there is no way to the host",
    "EINVAL": "an argument is invalid",
    "EIO": "the storage failed",
    "EISDIR": "the path is a directory",
    "ELOOP": "too many symbolic links",
    "EMFILE": "too many open files of this process, or of this client on the server",
    "ENAMETOOLONG": "the path or a name in it is too long",
    "ENETUNREACH": "there is no way to the network",
    "ENOENT": "there is no such export or file",
    "ENOMEM": "there is not enough memory",
    "ENOSPC": "there is no space",
    "ENOTCONN": "the session has ended, or its server is lost",
    "ENOTDIR": "a part of the path is not a directory",
    "EOPNOTSUPP": "the server or its storage cannot do that",
    "EPERM": "the operation is not permitted",
    "EPIPE": "the server is lost",
    "EROFS": "the export is read-only",
    "ETIMEDOUT": "the server did not answer in time",
}

# Parameters that are also words of a sentence: these are parameters only in backquotes.
WORDS = set(
    "path flags mode name list size type offset length target value link operation from to count dir entry"
    " args transport timeout extents checksum end options stat url data events event other buf".split()
) - {"buf"}


def fail(sentence):
    sys.exit(f"scripts/manual.py: {sentence}")


class Header:
    """What the header declares, with its comments."""

    def __init__(self, text):
        self.sections = {}  # heading: the paragraphs of its comment
        self.functions = {}  # name: (type, [parameter])
        self.comments = {}  # name: (names, paragraphs)
        self.section_of = {}
        self.types = {}  # struct: [(declaration, comment)]
        self.constants = {}  # constant: comment
        body = text[text.index('extern "C" {') : text.rindex("#endif /* RAIO_NO_INLINE */")]
        part = r"/\*(?P<comment>.*?)\*/|(?P<code>[^\n]+)|(?P<blank>\n[ \t]*\n)"
        section, pending = None, None
        for token in re.finditer(part, body, re.S):
            if token["comment"]:
                heading = re.fullmatch(r" (.*?) -{20,} ?", token["comment"])
                if heading:
                    section, pending = heading[1], None
                else:
                    pending = paragraphs(token["comment"])
                    alone = body[token.end() : token.end() + 2] == "\n\n"
                    if alone and section and section not in self.sections:
                        self.sections[section] = pending
                        pending = None
            elif token["blank"]:
                pending = None
            else:
                self.code(token["code"], body, token.start(), section, pending)
        for struct in re.finditer(r"^struct (\w+) \{\n(.*?)^\};", body + "", re.S | re.M):
            self.types[struct[1]] = fields(struct[2])
        for define in re.finditer(r"^#define (RAIO_\w+)\t*[^\n]*?/\* (.*?) \*/", text, re.S | re.M):
            self.constants[define[1]] = one_line(define[2])
        for constant in re.finditer(r"^\t(RAIO_CMD_\w+) = \d+,?(?:\s*/\* (.*?) \*/)?$", text, re.M):
            self.constants[constant[1]] = constant[2] or ""
        # What is said of all calls, each paragraph with its subject in front.
        self.general = dict(
            re.match(r"([A-Z][\w ]+)\. +(.*)", each).groups()
            for each in paragraphs(text[text.index("*\n") : text.index("*/\n#ifndef")])
            if re.match(r"[A-Z][\w ]+\. ", each)
        )

    def code(self, line, body, start, section, comment):
        found = re.match(r"(?:static inline )?([\w ]+?[ *]+)(raio_\w+)\(", line)
        if not found or line.startswith(("\t", "typedef", "struct ")):
            return
        name = found[2]
        end = body.index(")", start)
        parameters = one_line(body[start + found.end() : end]).split(", ")
        if not name.endswith("_"):
            self.functions[name] = (found[1].strip(), parameters)
            self.section_of[name] = section
        if not comment:
            return
        if name == "raio_prep_path_":
            self.comments[name] = ([], comment)
            return
        begun = re.match(r"((?:raio_\w+, )*raio_\w+) - ", comment[0])
        if not begun:
            fail(f"the comment before {name}() does not begin with its name: '{name} - what it does'.")
        for each in begun[1].split(", "):
            self.comments[each] = (begun[1].split(", "), [comment[0][begun.end() :], *comment[1:]])


def one_line(text):
    return re.sub(r"\s+", " ", text.replace("\n *", "\n")).strip()


def paragraphs(comment):
    """The paragraphs of a comment; one that is a table keeps its lines."""
    first, *rest = comment.split("\n")
    lines = [first.strip(), *(re.sub(r"^ ?\*? ?", "", line, count=1).rstrip() for line in rest)]
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    return [block if block.startswith("  ") else one_line(block) for block in blocks if block.strip()]


def fields(text):
    """The fields of a structure: pairs of declaration and comment."""
    found = []
    # A declaration, and its comment, which may begin on the same line only.
    declared = r"^\t+(?!\})([\w *]+?[ *]\w+(?:\[\w+\])?);[ \t]*(?:/\* (.*?) \*/)?$"
    for field in re.finditer(declared, text, re.S | re.M):
        name = re.search(r"(\w+)(?:\[\w+\])?$", field[1])[1]
        if name not in ("pad", "reserved", "reserved_0", "c"):
            found.append((field[1], one_line(field[2] or "")))
    return found


# Prose to mdoc -------------------------------------------------------------------------------------------


class Page:
    """Lines of mdoc."""

    def __init__(self, header, name, calls, parameters):
        self.header, self.name, self.calls = header, name, calls
        self.parameters = parameters
        self.lines = []
        self.text = ""

    def macro(self, line):
        self.flush()
        self.lines.append(line)

    def flush(self):
        if self.text:
            text = self.text
            self.lines.append("\\&" + text if text[0] in ".'" else text)
            self.text = ""

    def plain(self, word):
        word = re.sub(r"(?<![\w-])-(?=\d)", r"\\-", word.replace("\\", "\\e"))
        if len(self.text) + 1 + len(word) > 82:
            self.flush()
        self.text = f"{self.text} {word}" if self.text else word
        if re.search(r"[.:?!]\)?$", word):
            self.flush()

    def prose(self, text):
        """A paragraph."""
        text = re.sub(r"\bstruct (raio_\w+)", "struct\u00a0\\1", text)
        for word in text.split(" "):
            front = re.match(r"[(\[]*", word)[0]
            rest = word[len(front) :]
            core = rest.rstrip(".,:;)!?")
            if core.count("(") > core.count(")"):
                core = rest[: len(core) + 1]
            if core.startswith("`") and "`" in core[1:]:
                core = rest[: rest.index("`", 1) + 1]
            behind = rest[len(core) :]
            possessive = re.fullmatch(r"(.*?)('s?)", core)
            macro = self.macro_of(possessive[1] if possessive else core)
            if not macro or "]" in behind:
                self.plain(word.replace("`", "").replace("\u00a0", " "))
                continue
            line = f".Pf {' '.join(front)} {macro}" if front else f".{macro}"
            if possessive:
                line += f" Ns {possessive[2]}"
            self.macro(" ".join([line, *behind]))
        self.flush()

    def macro_of(self, core):
        is_code = core.startswith("`") and core.endswith("`") and len(core) > 2
        word = core.strip("`")
        call = re.fullmatch(r"(raio_\w*)(\*)?(?:\(\))?", word)
        if call and (word.endswith("()") or call[2] or call[1] in self.header.functions):
            if call[2] or call[1] not in self.header.functions:
                return f"Fn {call[1]}{call[2] or ''}"
            return f"Fn {call[1]}" if call[1] in self.calls else f"Xr {call[1]} 3"
        page = re.fullmatch(r"([a-zA-Z_][\w-]*)\((\d)\)", word)
        if page:
            return f"Xr {page[1]} {page[2]}"
        if word.startswith("struct\u00a0"):
            return f'Vt "{word.replace(chr(0xA0), " ")}"'
        if re.fullmatch(r"-?E[A-Z0-9]{3,}", word) and word.lstrip("-") in KNOWN:
            return f"Er {word.replace('-', chr(92) + '-')}"
        if re.fullmatch(r"(RAIO|O|LOCK|FALLOC|EFD)_[A-Z0-9_*]+|NULL|SIGSEGV|SSIZE_MAX", word):
            return f"Dv {word}"
        if re.fullmatch(r"--[a-z-]+", word):
            return f"Fl {word[1:]}"
        if re.fullmatch(r"\$\w+(/\S*)?", word):
            return f"Ev {word}"
        if re.match(r"raio(\+\w+)?://", word):
            return f"Li {word}"
        if re.match(r"/[A-Z]+/", word):
            return f"Pa {word}"
        name = word.lstrip("*")
        if name in self.parameters and (is_code or word != name or name not in WORDS):
            return f"Fa {word}"
        if is_code or re.fullmatch(r"\*?[a-z]+(?:_[a-z0-9]+)+|\w+(?:->|\.)[\w.]+", word):
            return f"Va {word}" if re.fullmatch(r"[\w.>*-]+", word) else None
        return None

    def paragraph(self, text):
        if not text.startswith("  "):
            self.prose(text)
            return
        self.macro(".Bl -tag -width Ds")
        items = []
        for line in text.split("\n"):
            begun = re.match(r"  (\S+)\s*(.*)$", line)
            if begun:
                items.append((begun[1], [begun[2]]))
            else:
                items[-1][1].append(line.strip())
        for tag, lines in items:
            self.macro(f".It Li {tag}")
            self.prose(" ".join(lines).strip())
        self.macro(".El")


KNOWN = set(ERRORS) | set(
    "EAFNOSUPPORT EAGAIN EBUSY ECANCELED EFAULT EILSEQ EINTR EKEYREJECTED ENODATA ENODEV ENOKEY ENOLCK ENXIO"
    " EPROTO EPROTONOSUPPORT ERANGE ESTALE EUSERS EWOULDBLOCK EXDEV E2BIG".split()
)


def split(text, separators):
    """Splits at separators outside of brackets."""
    parts, depth, begin, at = [], 0, 0, 0
    while at < len(text):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        found = next((s for s in separators if depth == 0 and text.startswith(s, at)), None)
        if found:
            parts.append(text[begin:at])
            at += len(found)
            begin = at
        else:
            at += 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


UNCHANGED = ("fd", "nr", "buf", "len", "ctx", "enum", "sizeof", "min_nr")


def sentence(text):
    """A sentence of the reason for an error, or of the comment of a field."""
    first = text.split(" ")[0]
    if re.fullmatch(r"[a-z]+[,:;]?", first) and first.rstrip(",:;") not in UNCHANGED:
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def errors(text):
    """What stands behind `errno:`, as (introduction, [(errno, reason)], [what else]) for each sentence that is a
    list, and what is no list."""
    lists, prose = [], []
    for part in split(text, [". "]):
        introduction, listed = "", part.rstrip(".")
        if not re.match(r"-?E[A-Z0-9]{3,}\b", listed) and re.match(r"[^(]*?: -?E[A-Z0-9]{3,}\b", listed):
            introduction, _, listed = listed.partition(": ")
        items = split(listed, [", or ", "; and ", ", ", "; ", " or "])
        if lists and not introduction or not any(re.match(r"-?E[A-Z0-9]{3,}\b", item) for item in items):
            prose.append(part if part.endswith(".") else part + ".")
            continue
        found, other = [], []
        for item in items:
            matched = re.fullmatch(r"(-?E[A-Z0-9]+)(?: \((.*)\))?(?: (with \S+))?", item)
            if matched and matched[1].lstrip("-") in KNOWN:
                default = ERRORS.get(matched[1].lstrip("-"))
                reason = matched[2] or default
                if not reason:
                    fail(f"there is no reason for {matched[1]} in {text!r}: write {matched[1]} (why).")
                if reason.startswith("also "):
                    reason = f"{default}; {reason}" if default else reason
                found.append((matched[1], reason))
            else:
                other.append(item)
        lists.append((introduction, found, other))
    return lists, prose


def write_errors(page, who, text):
    lists, prose = errors(text)
    for introduction, found, other in lists:
        if introduction:
            page.macro(".Pp")
            page.prose(introduction + ":")
        elif found and who:
            page.macro(who)
        if found:
            page.macro(".Bl -tag -width Er")
            for errno, reason in found:
                page.macro(f".It Bq Er {errno.replace('-', chr(92) + '-')}")
                page.prose(sentence(reason))
            page.macro(".El")
        if other:
            page.macro(".Pp")
            page.prose("Also " + ", and ".join(other) + ".")
    return prose


def fn_list(names):
    """Lines that name functions in a sentence."""
    if len(names) == 1:
        return [f".Fn {names[0]}"]
    lines = [f".Fn {name} ," for name in names[:-2]]
    return [*lines, f".Fn {names[-2]}", "and", f".Fn {names[-1]}"]


def declaration(page, name):
    kind, parameters = page.header.functions[name]
    page.macro(f'.Ft "{kind}"' if " " in kind else f".Ft {kind}")
    page.macro(f".Fn {name} " + " ".join(f'"{each}"' if " " in each else each for each in parameters))


def make(header, name):
    about, calls, types, see = PAGES[name]
    calls = [f"raio_{call}" for call in calls.split()]
    parameters = {re.search(r"(\w+)(\[\])?$", p)[1] for call in calls for p in header.functions[call][1]}
    page = Page(header, name, calls, parameters)
    date = re.search(r"^\.Dd .*$", (MAN / "libraio.3").read_text(), re.M)[0]
    page.macro('.\\" SPDX-License-Identifier: MIT OR Apache-2.0')
    page.macro('.\\" Made by scripts/manual.py from libraio/include/libraio.h: change that, and run it.')
    for line in (date, f".Dt {name.upper()} 3", ".Os", ".Sh NAME"):
        page.macro(line)
    for call in calls:
        page.macro(f".Nm {call}" + (" ," if call != calls[-1] else ""))
    page.macro(f".Nd {about}")
    for line in (".Sh LIBRARY", "libraio", ".Pq \\-lraio", ".Sh SYNOPSIS", ".In libraio.h"):
        page.macro(line)
    for call in calls:
        declaration(page, call)
    page.macro(".Sh DESCRIPTION")
    section = header.section_of[calls[0]]
    is_prep = section == "Preparing control blocks"
    is_path = section == "Names" or "raio_path_args" in types.split()
    returned = describe(page, calls)
    if section == "Names":
        page.macro(".Ss Calls on paths")
        page.prose(header.sections["Names"][0].removeprefix("Calls on paths. "))
    if is_prep:
        page.macro(".Ss All iocbs")
        if is_path:
            page.prose(header.comments["raio_prep_path_"][1][0])
            page.macro(".Pp")
        for at, text in enumerate(header.sections[section]):
            page.macro(".Pp") if at else None
            page.prose(text)
    if not is_prep:
        page.macro(".Ss Threads")
        page.prose(header.general["Threads"])
        page.macro(".Pp")
        page.prose(
            "libraio(3) has what applies to all calls: timeouts, lost connections, fork, and the order of"
            " operations."
        )
    show_types(page, types.split())
    page.macro(".Sh RETURN VALUES")
    ending = []
    for names, text in returned:
        subject, _, listed = text.partition("errno: ")
        page.macro(".Pp") if page.lines[-1] != ".Sh RETURN VALUES" else None
        if subject.startswith("Returns"):
            for line in fn_list(names):
                page.macro(line)
            subject = ("returns" if len(names) == 1 else "return") + subject.removeprefix("Returns")
        page.prose((subject + "errno.") if listed else subject)
        if listed:
            ending.append((names, listed))
    if section == "Names":
        all_said = {each for names, _ in returned for each in names} == set(calls)
        page.macro(".Pp") if returned and not all_said else None
        subject, _, listed = header.sections["Names"][1].partition("errno: ")
        if not all_said:
            begin = "The others return 0," if returned else "These calls return 0,"
            page.prose(subject.replace("They return 0, or where stated a number,", begin) + "errno.")
        ending.insert(0, ([], listed))
    elif is_prep:
        subject = "This function returns" if len(calls) == 1 else "These functions return"
        page.prose(f"{subject} nothing, and cannot fail: raio_submit() checks the iocb.")
    elif not returned:
        fail(f"the comments of {name} do not say what the calls return.")
    example = EXAMPLES / f"{name}.c"
    if example.exists():
        page.macro(".Sh EXAMPLES")
        _, comment, code = example.read_text().split("*/\n", 2)
        page.prose(one_line(comment.removeprefix("/*")) + ":")
        page.macro(".Bd -literal")
        for line in code.strip("\n").replace("\\", "\\e").split("\n"):
            page.lines.append("\\&" + line if line.startswith((".", "'")) else line)
        page.macro(".Ed")
    if ending or is_prep:
        page.macro(".Sh ERRORS")
    for at, (names, listed) in enumerate(ending):
        page.macro(".Pp") if at else None
        who = None
        if names and (len(calls) > 1 or at):
            for line in fn_list(names):
                page.macro(line)
            who = "fails with:" if len(names) == 1 else "fail with:"
        for text in write_errors(page, who, listed):
            page.macro(".Pp")
            page.prose(text)
    if is_prep:
        same = [call.replace("_prep", "") for call in calls]
        same = [f"{call}()" for call in same if call in header.functions and call not in calls]
        reasons = f", and for the reasons {', '.join(same)}" if same else ""
        page.prose(
            "raio_submit() fails if the iocb is invalid. Otherwise the event's `res` has the negated errno: see"
            f" raio_getevents(){reasons}."
        )
    page.macro(".Sh SEE ALSO")
    see = sorted({*see.split(), "libraio"})
    for other in see:
        page.macro(f".Xr {other} 3" + (" ," if other != see[-1] else ""))
    return "\n".join(page.lines) + "\n"


def describe(page, calls):
    """What the calls do. Returns what they return, as pairs of names and text."""
    returned, done = [], set()
    for call in calls:
        if call in done:
            continue
        if call not in page.header.comments:
            fail(f"there is no comment for {call}().")
        names, texts = page.header.comments[call]
        names = [name for name in names if name in calls]
        done.update(names)
        if page.lines[-1] != ".Sh DESCRIPTION":
            page.macro(".Pp")
        for line in fn_list(names):
            page.macro(line)
        for at, text in enumerate(texts):
            if re.match(r"Returns\b", text) or re.search(r"^A get .* return the length", text):
                returned.append((names, text))
                continue
            # A table comes without a space in front.
            page.macro(".Pp") if at and not text.startswith("  ") else None
            page.paragraph(text)
    return returned


def show_types(page, names):
    header = page.header
    for name in names:
        if name in header.types:
            page.macro(f'.Ss "struct {name}"')
            rows = [(f".It Va {declared}", comment) for declared, comment in header.types[name]]
        else:
            constants = header.constants.items()
            rows = [(f".It Dv {each}", text) for each, text in constants if each.startswith(name)]
            if not rows:
                if not re.search(rf"^#define {name}\w+ ", HEADER.read_text(), re.M):
                    fail(f"the header has no {name}.")
                continue
            page.macro(f".Ss {name}*")
        page.macro(".Bl -tag -width Ds")
        for tag, comment in rows:
            page.macro(tag)
            if comment:
                page.prose(sentence(comment))
        page.macro(".El")


# What is checked -----------------------------------------------------------------------------------------


def faults(header, pages):
    described = {f"raio_{call}" for _, calls, _, _ in PAGES.values() for call in calls.split()}
    for name in sorted(header.functions.keys() - described):
        yield f"{name}() has no manual page: add it to PAGES in scripts/manual.py"
    for name in sorted(described - header.functions.keys()):
        yield f"{name}() of PAGES in scripts/manual.py is not in the header"
    overview = (MAN / "libraio.3").read_text()
    for name in sorted(header.functions):
        if not re.search(rf"\b{name}\b", overview):
            yield f"libraio(3) does not name {name}(): add it to its table of calls"
    ours = {path.name for path in MAN.iterdir()} | {f"{name}.3" for name in described}
    for path in sorted(MAN.iterdir()):
        for name, section in re.findall(r"\bXr (raio[\w.-]*|libraio) (\d)", path.read_text()):
            if f"{name}.{section}" not in ours:
                yield f"docs/man/{path.name} refers to {name}({section}), and there is no such page"
    for name, text in pages.items():
        path = MAN / f"{name}.3"
        if not path.exists() or path.read_text() != text:
            yield f"docs/man/{name}.3 is not what the header says: run scripts/manual.py"
    for path in MAN.glob("raio_*.3"):
        if path.stem not in PAGES:
            yield f"docs/man/{path.name} is not in PAGES of scripts/manual.py: remove it"
    for path in sorted(EXAMPLES.glob("*.c")):
        if path.stem not in PAGES:
            yield f"{path.relative_to(ROOT)} belongs to no page: its name is that of a page"
        with tempfile.TemporaryDirectory() as work:
            # From the page, as readers copy it.
            shown = re.search(r"^\.Bd -literal\n(.*?)^\.Ed$", pages.get(path.stem, ""), re.S | re.M)
            source = pathlib.Path(work) / path.name
            source.write_text(re.sub(r"^\\&", "", (shown[1] if shown else ""), flags=re.M).replace("\\e", "\\"))
            flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", HEADER.parent]
            compiled = subprocess.run(["cc", *flags, source], stderr=subprocess.PIPE, text=True)
            if compiled.returncode:
                yield f"{path.relative_to(ROOT)} does not compile: {compiled.stderr}"


def main():
    header = Header(HEADER.read_text())
    for name, (_, calls, _, _) in PAGES.items():
        for call in calls.split():
            if f"raio_{call}" not in header.functions:
                fail(f"raio_{call}() of PAGES is not in the header.")
    pages = {name: make(header, name) for name in PAGES}
    if sys.argv[1:] == ["--check"]:
        found = list(faults(header, pages))
        print("\n".join(found) or f"scripts/manual.py: {len(header.functions)} calls in {len(pages)} pages")
        sys.exit(bool(found))
    if sys.argv[1:]:
        fail("the only option is --check.")
    for name, text in pages.items():
        (MAN / f"{name}.3").write_text(text)


if __name__ == "__main__":
    main()
