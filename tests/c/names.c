/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Names, directories, attributes and whole small files: as calls, and the same as iocbs.
 */
#define _GNU_SOURCE
#include "check.h"

#define MANY 32
#define PATH_BYTES 256

static char top[64];

/* A path beneath the directory of this test. */
static const char *beneath(char *path, const char *name)
{
	snprintf(path, PATH_BYTES, "%s/%s", top, name);
	return path;
}

static unsigned int mode_of(int fd, const char *path)
{
	struct raio_stat status;

	return raio_lstat_path(fd, path, &status, sizeof(status)) ? 0 : status.mode;
}

static void small_files_in_one_call(int fd)
{
	char path[PATH_BYTES], other[PATH_BYTES], in[100];
	struct raio_stat status, shorter;

	beneath(path, "small");
	EQ(raio_put(fd, path, "hello", 5, 0640, 0), 0);
	EQ(raio_get(fd, path, in, sizeof(in), &status, sizeof(status)), 5);
	CHECK(!memcmp(in, "hello", 5));
	EQ(status.size, sizeof(status));
	EQ(status.file_bytes, 5);
	EQ(status.mode, S_IFREG | 0640);
	CHECK(is_all(status.identity, sizeof(status.identity), 0));
	EQ(raio_get(fd, path, in, 2, NULL, 0), 2);
	EQ(raio_get(fd, path, NULL, 0, NULL, 0), 0);
	EQ(raio_put(fd, path, NULL, 0, 0600, RAIO_PUT_FSYNC), 0);
	EQ(raio_get(fd, path, in, sizeof(in), NULL, 0), 0);
	FAILS(raio_put(fd, path, "x", 1, 0600, RAIO_PUT_EXCL), EEXIST);
	FAILS(raio_put(fd, path, "x", 1, 0600, 1u << 20), EINVAL);
	FAILS(raio_put(fd, path, NULL, 1, 0600, 0), EINVAL);
	FAILS(raio_put(fd, NULL, "x", 1, 0600, 0), EINVAL);
	FAILS(raio_put(fd, "", "x", 1, 0600, 0), ENOENT);
	FAILS(raio_put(fd, "/ro/new", "x", 1, 0600, 0), EROFS);
	FAILS(raio_put(12345, path, "x", 1, 0600, 0), EBADF);
	FAILS(raio_get(fd, path, NULL, 1, NULL, 0), EINVAL);
	FAILS(raio_get(fd, beneath(other, "missing"), in, 1, NULL, 0), ENOENT);
	FAILS(raio_get(fd, top, in, 1, NULL, 0), EISDIR);

	EQ(raio_stat_path(fd, "/ro/data.bin", &status, sizeof(status)), 0);
	EQ(status.file_bytes, DATA_BIN_BYTES);
	memset(&shorter, 0xff, sizeof(shorter));
	EQ(raio_stat_path(fd, "/ro/data.bin", &shorter, 16), 0);
	EQ(shorter.size, 16);
	EQ(shorter.file_bytes, DATA_BIN_BYTES);
	CHECK(is_all(&shorter.blocks, sizeof(shorter) - 16, 0xff));
	FAILS(raio_stat_path(fd, path, &status, 8), EINVAL);
	FAILS(raio_stat_path(fd, path, NULL, sizeof(status)), EINVAL);
}

static void names_are_made_changed_and_removed(int fd)
{
	char path[PATH_BYTES], other[PATH_BYTES], buf[PATH_BYTES];
	struct raio_stat status;
	struct raio_statfs room;

	EQ(raio_mkdir(fd, beneath(path, "directory"), 0750), 0);
	EQ(mode_of(fd, path), S_IFDIR | 0750);
	FAILS(raio_mkdir(fd, path, 0750), EEXIST);
	FAILS(raio_unlink(fd, path), EISDIR);
	beneath(path, "directory/file");
	EQ(raio_put(fd, path, "0123456789", 10, 0600, 0), 0);
	FAILS(raio_rmdir(fd, beneath(other, "directory")), ENOTEMPTY);
	EQ(raio_link(fd, path, beneath(other, "second")), 0);
	EQ(raio_stat_path(fd, other, &status, sizeof(status)), 0);
	EQ(status.links, 2);
	FAILS(raio_rename(fd, path, other, RAIO_RENAME_NOREPLACE), EEXIST);
	FAILS(raio_rename(fd, path, other, 1u << 9), EINVAL);
	EQ(raio_rename(fd, other, beneath(buf, "third"), 0), 0);
	FAILS(raio_unlink(fd, other), ENOENT);
	EQ(raio_unlink(fd, buf), 0);

	EQ(raio_symlink(fd, "directory/file", beneath(other, "link")), 0);
	EQ(raio_stat_path(fd, other, &status, sizeof(status)), 0);
	EQ(status.file_bytes, 10);
	EQ(mode_of(fd, other) & S_IFMT, S_IFLNK);
	memset(buf, 'x', sizeof(buf));
	EQ(raio_readlink(fd, other, buf, sizeof(buf)), 14);
	CHECK(!memcmp(buf, "directory/filex", 15));
	EQ(raio_readlink(fd, other, buf, 3), 3);
	FAILS(raio_readlink(fd, other, NULL, 3), EINVAL);
	FAILS(raio_readlink(fd, path, buf, 3), EINVAL);

	EQ(raio_truncate(fd, path, 4), 0);
	EQ(raio_chmod(fd, path, 0644), 0);
	EQ(raio_utimens(fd, path, -1500000000LL, 0), 0);
	EQ(raio_utimens(fd, other, 5, RAIO_PATH_NOFOLLOW), 0);
	FAILS(raio_utimens(fd, path, 5, 1u << 5), EINVAL);
	EQ(raio_stat_path(fd, path, &status, sizeof(status)), 0);
	EQ(status.file_bytes, 4);
	EQ(status.mode, S_IFREG | 0644);
	EQ(status.modified_ns, -1500000000LL);
	EQ(raio_lstat_path(fd, other, &status, sizeof(status)), 0);
	EQ(status.modified_ns, 5);

	EQ(raio_statfs_path(fd, path, &room, sizeof(room)), 0);
	EQ(room.size, sizeof(room));
	CHECK(room.block_bytes && room.blocks >= room.blocks_free && room.name_bytes_max >= 255);
	FAILS(raio_statfs_path(fd, path, NULL, sizeof(room)), EINVAL);

	EQ(raio_unlink(fd, other), 0);
	EQ(raio_unlink(fd, path), 0);
	EQ(raio_rmdir(fd, beneath(other, "directory")), 0);
	FAILS(raio_rmdir(fd, other), ENOENT);
}

static void extended_attributes(int fd)
{
	char path[PATH_BYTES], value[100];

	EQ(raio_put(fd, beneath(path, "attributes"), "x", 1, 0600, 0), 0);
	if (raio_setxattr(fd, path, "user.test", "value", 5, 0) && errno == EOPNOTSUPP) {
		printf("this file system has no extended attributes\n");
		return;
	}
	FAILS(raio_setxattr(fd, path, "user.test", "other", 5, RAIO_XATTR_CREATE), EEXIST);
	EQ(raio_setxattr(fd, path, "user.none", NULL, 0, RAIO_XATTR_CREATE), 0);
	EQ(raio_getxattr(fd, path, "user.test", value, sizeof(value)), 5);
	CHECK(!memcmp(value, "value", 5));
	EQ(raio_getxattr(fd, path, "user.test", NULL, 0), 5);
	EQ(raio_getxattr(fd, path, "user.none", value, sizeof(value)), 0);
	FAILS(raio_getxattr(fd, path, "user.test", value, 4), ERANGE);
	FAILS(raio_getxattr(fd, path, "user.test", NULL, 4), EINVAL);
	FAILS(raio_getxattr(fd, path, "user.missing", value, 4), ENODATA);
	EQ(raio_removexattr(fd, path, "user.none"), 0);
	EQ(raio_listxattr(fd, path, value, sizeof(value)), 10);
	CHECK(!memcmp(value, "user.test", 10));
	EQ(raio_listxattr(fd, path, NULL, 0), 10);
	FAILS(raio_listxattr(fd, path, value, 9), ERANGE);
	FAILS(raio_removexattr(fd, path, "user.none"), ENODATA);
}

static void directories_are_listed(int fd)
{
	char path[PATH_BYTES], name[32];
	unsigned char found[MANY] = { 0 };
	struct raio_dirent entry;
	raio_dir_t dir;
	int i, left = MANY;

	EQ(raio_mkdir(fd, beneath(path, "many"), 0700), 0);
	for (i = 0; i < MANY; i++) {
		snprintf(name, sizeof(name), "many/%d", i);
		EQ(raio_put(fd, beneath(path, name), "0123456789abcdef0123456789abcdef", i, 0600, 0), 0);
	}
	dir = raio_opendir(fd, beneath(path, "many"));
	MUST(dir != NULL);
	while (raio_readdir(dir, &entry, sizeof(entry)) == 1) {
		i = atoi(entry.name);
		CHECK(i >= 0 && i < MANY && !found[i]);
		found[i] = 1;
		left--;
		EQ(entry.size, sizeof(entry));
		EQ(entry.file_bytes, i);
		EQ(entry.mode, S_IFREG | 0600);
		EQ(entry.has_status, 1);
		CHECK(entry.inode && entry.modified_ns > 0);
	}
	EQ(left, 0);
	EQ(raio_readdir(dir, &entry, sizeof(entry)), 0);
	FAILS(raio_readdir(dir, NULL, sizeof(entry)), EINVAL);
	EQ(raio_closedir(dir), 0);
	FAILS(raio_closedir(dir), EINVAL);
	FAILS(raio_readdir(dir, &entry, sizeof(entry)), EINVAL);
	FAILS(raio_closedir(NULL), EINVAL);
	CHECK(!raio_opendir(fd, "/ro/data.bin") && errno == ENOTDIR);
	CHECK(!raio_opendir(fd, NULL) && errno == EINVAL);
	/* The exports, and one that is not read to its end. */
	dir = raio_opendir(fd, "/");
	MUST(dir != NULL);
	EQ(raio_readdir(dir, &entry, sizeof(entry)), 1);
	EQ(raio_closedir(dir), 0);
}

static void what_is_done_to_an_open_file(int fd)
{
	struct raio_extent extents[4];
	unsigned long long end = 0;
	struct raio_stat status;
	char path[PATH_BYTES], byte;
	int file = raio_open(fd, beneath(path, "open"), O_RDWR | O_CREAT);

	MUST(file > 0);
	EQ(raio_pwrite(file, "x", 1, 0), 1);
	EQ(raio_fsync(file, 0), 0);
	EQ(raio_fsync(file, 1), 0);
	EQ(raio_ftruncate(file, 1 << 20), 0);
	EQ(raio_stat_fd(file, &status, sizeof(status)), 0);
	EQ(status.file_bytes, 1 << 20);
	EQ(raio_pread(file, &byte, 1, 1000), 1);
	EQ(byte, 0);
	CHECK(raio_extents(file, 0, 1 << 20, extents, 4, &end) >= 1);
	EQ(extents[0].offset, 0);
	CHECK(extents[0].length >= 1);
	EQ(end, 1 << 20);
	FAILS(raio_extents(file, 0, 1, NULL, 4, &end), EINVAL);
	FAILS(raio_extents(file, 0, 1, extents, 0, &end), EINVAL);
	FAILS(raio_extents(file, -1, 1, extents, 4, &end), EINVAL);
	FAILS(raio_fsync(12345, 0), EBADF);
	FAILS(raio_ftruncate(12345, 0), EBADF);
	EQ(raio_close(file), 0);
}

static void all_of_it_as_iocbs(int fd)
{
	char path[PATH_BYTES], other[PATH_BYTES], in[MANY][100], link[100];
	struct raio_path_args args[MANY];
	struct raio_iocb iocbs[MANY], *ios[MANY];
	struct raio_event events[MANY];
	struct raio_stat status[MANY];
	raio_context_t ctx = NULL;
	int files[MANY], i, n;

	EQ(raio_setup(fd, MANY + 1, &ctx), 0);
	raio_prep_mkdir(&iocbs[0], fd, &args[0], beneath(path, "iocbs"), 0700);
	EQ(run_iocb(ctx, &iocbs[0]), 0);

	/* Many puts, gets and opens at once. The paths are not needed after raio_submit(). */
	for (i = 0; i < MANY; i++) {
		snprintf(link, sizeof(link), "iocbs/%d", i);
		memset(in[i], i, sizeof(in[i]));
		raio_prep_put(&iocbs[i], fd, &args[i], beneath(path, link), in[i], i, 0600, RAIO_PUT_EXCL, NULL);
		args[i].modified_ns = 1000 + i;
		args[i].flags |= RAIO_PUT_MTIME;
		ios[0] = &iocbs[i];
		EQ(raio_submit(ctx, 1, ios), 1);
	}
	for (n = 0; n < MANY; n++) {
		EQ(raio_getevents(ctx, 1, 1, events, NULL), 1);
		EQ(events[0].res, events[0].obj - iocbs);
	}
	for (i = 0; i < MANY; i++) {
		snprintf(link, sizeof(link), "iocbs/%d", i);
		memset(in[i], 0xff, sizeof(in[i]));
		raio_prep_get(&iocbs[i], fd, &args[i], beneath(path, link), in[i], sizeof(in[i]),
			      i % 2 ? &status[i] : NULL, NULL);
		ios[0] = &iocbs[i];
		EQ(raio_submit(ctx, 1, ios), 1);
	}
	for (n = 0; n < MANY; n++) {
		EQ(raio_getevents(ctx, 1, 1, events, NULL), 1);
		i = (int)(events[0].obj - iocbs);
		EQ(events[0].res, i);
		CHECK(is_all(in[i], i, (unsigned char)i) && is_all(in[i] + i, (long)sizeof(in[i]) - i, 0xff));
		if (i % 2) {
			EQ(status[i].file_bytes, i);
			EQ(status[i].modified_ns, 1000 + i);
		}
	}
	for (i = 0; i < MANY; i++) {
		snprintf(link, sizeof(link), "iocbs/%d", i);
		raio_prep_open(&iocbs[i], fd, &args[i], beneath(path, link), O_RDWR, 0);
		ios[0] = &iocbs[i];
		EQ(raio_submit(ctx, 1, ios), 1);
	}
	for (n = 0; n < MANY; n++) {
		EQ(raio_getevents(ctx, 1, 1, events, NULL), 1);
		i = (int)(events[0].obj - iocbs);
		files[i] = (int)events[0].res;
		CHECK(files[i] > 0 && files[i] != fd);
	}
	raio_prep_ftruncate(&iocbs[0], files[1], 77);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	raio_prep_stat_fd(&iocbs[0], files[1], &status[0]);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	EQ(status[0].file_bytes, 77);
	EQ(status[0].size, sizeof(status[0]));
	EQ(read_at(ctx, files[5], in[0], 10, 0), 5);
	for (i = 0; i < MANY; i++) {
		raio_prep_close(&iocbs[i], files[i]);
		ios[0] = &iocbs[i];
		EQ(raio_submit(ctx, 1, ios), 1);
		EQ(read_at(ctx, files[i], in[0], 1, 0), -EBADF);
		if (i % 2 == 0)
			EQ(raio_submit(ctx, 1, ios), -EBADF);
	}

	EQ(raio_destroy(ctx), 0);
	ctx = NULL;
	EQ(raio_setup(fd, MANY + 1, &ctx), 0);
	beneath(path, "iocbs/1");
	raio_prep_rename(&iocbs[0], fd, &args[0], path, beneath(other, "iocbs/2"), RAIO_RENAME_NOREPLACE);
	EQ(run_iocb(ctx, &iocbs[0]), -EEXIST);
	raio_prep_rename(&iocbs[0], fd, &args[0], path, beneath(other, "iocbs/renamed"), 0);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	raio_prep_link(&iocbs[0], fd, &args[0], other, path);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	raio_prep_unlink(&iocbs[0], fd, &args[0], other);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	EQ(run_iocb(ctx, &iocbs[0]), -ENOENT);
	raio_prep_symlink(&iocbs[0], fd, &args[0], "1", other);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	memset(link, 'x', sizeof(link));
	raio_prep_readlink(&iocbs[0], fd, &args[0], other, link, sizeof(link));
	EQ(run_iocb(ctx, &iocbs[0]), 1);
	CHECK(link[0] == '1' && link[1] == 'x');
	raio_prep_stat_path(&iocbs[0], fd, &args[0], other, &status[0], 0);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	EQ(status[0].file_bytes, 77);
	raio_prep_stat_path(&iocbs[0], fd, &args[0], other, &status[0], RAIO_PATH_NOFOLLOW);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	EQ(status[0].mode & S_IFMT, S_IFLNK);
	raio_prep_rmdir(&iocbs[0], fd, &args[0], beneath(other, "iocbs"));
	EQ(run_iocb(ctx, &iocbs[0]), -ENOTEMPTY);

	/* Misuse. */
	ios[0] = &iocbs[0];
	raio_prep_unlink(&iocbs[0], fd, &args[0], "");
	EQ(raio_submit(ctx, 1, ios), -ENOENT);
	raio_prep_unlink(&iocbs[0], fd, &args[0], NULL);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_unlink(&iocbs[0], 12345, &args[0], path);
	EQ(raio_submit(ctx, 1, ios), -EBADF);
	raio_prep_unlink(&iocbs[0], fd, &args[0], path);
	args[0].reserved[1] = 1;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_unlink(&iocbs[0], fd, &args[0], path);
	args[0].flags = 1;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_unlink(&iocbs[0], fd, &args[0], path);
	iocbs[0].u.c.nbytes--;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_unlink(&iocbs[0], fd, &args[0], path);
	iocbs[0].u.c.buf = NULL;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_stat_path(&iocbs[0], fd, &args[0], path, NULL, 0);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_stat_fd(&iocbs[0], fd, NULL);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_link(&iocbs[0], fd, &args[0], path, NULL);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	iocbs[0].raio_lio_opcode = RAIO_CMD_FLOCK + 1;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	EQ(raio_destroy(ctx), 0);
}

static void attributes_as_iocbs(int fd)
{
	char path[PATH_BYTES], value[100];
	struct raio_path_args args;
	struct raio_iocb iocb, *io = &iocb;
	struct raio_stat status;
	struct raio_statfs room;
	raio_context_t ctx = NULL;

	EQ(raio_setup(fd, 4, &ctx), 0);
	EQ(raio_put(fd, beneath(path, "set"), "0123456789", 10, 0600, 0), 0);
	raio_prep_truncate(&iocb, fd, &args, path, 4);
	EQ(run_iocb(ctx, &iocb), 0);
	raio_prep_chmod(&iocb, fd, &args, path, 0640);
	EQ(run_iocb(ctx, &iocb), 0);
	raio_prep_utimens(&iocb, fd, &args, path, -1500000000LL, 0);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(raio_stat_path(fd, path, &status, sizeof(status)), 0);
	EQ(status.file_bytes, 4);
	EQ(status.mode, S_IFREG | 0640);
	EQ(status.modified_ns, -1500000000LL);
	/* All at once. */
	raio_prep_truncate(&iocb, fd, &args, path, 7);
	args.mode = 0604;
	args.modified_ns = 99;
	args.flags |= RAIO_SET_MODE | RAIO_SET_MTIME;
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(raio_stat_path(fd, path, &status, sizeof(status)), 0);
	EQ(status.file_bytes, 7);
	EQ(status.mode, S_IFREG | 0604);
	EQ(status.modified_ns, 99);
	args.flags |= 1u << 6;
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_chmod(&iocb, fd, &args, "/ro/data.bin", 0640);
	EQ(run_iocb(ctx, &iocb), -EROFS);
	raio_prep_utimens(&iocb, fd, &args, beneath(path, "missing"), 5, RAIO_PATH_NOFOLLOW);
	EQ(run_iocb(ctx, &iocb), -ENOENT);
	beneath(path, "set");

	memset(&room, 0xff, sizeof(room));
	raio_prep_statfs_path(&iocb, fd, &args, path, &room);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(room.size, sizeof(room));
	CHECK(room.block_bytes && room.blocks >= room.blocks_free && room.name_bytes_max >= 255);
	memset(&room, 0xff, sizeof(room));
	args.nbytes = 16;
	EQ(run_iocb(ctx, &iocb), 0);
	CHECK(room.size == 16 && room.block_bytes < 1 << 30 && is_all(&room.blocks, sizeof(room) - 16, 0xff));
	args.nbytes = 8;
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_statfs_path(&iocb, fd, &args, path, NULL);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);

	raio_prep_setxattr(&iocb, fd, &args, path, "user.test", "value", 5, RAIO_XATTR_CREATE);
	if (run_iocb(ctx, &iocb) == -EOPNOTSUPP) {
		printf("this file system has no extended attributes\n");
		EQ(raio_destroy(ctx), 0);
		return;
	}
	EQ(run_iocb(ctx, &iocb), -EEXIST);
	raio_prep_setxattr(&iocb, fd, &args, path, "user.test", "longer", 6, 0);
	raio_set_crc(&iocb, raio_crc32c(0, "longer", 6));
	EQ(run_iocb(ctx, &iocb), 0);
	raio_prep_setxattr(&iocb, fd, &args, path, "user.none", NULL, 0, 0);
	EQ(run_iocb(ctx, &iocb), 0);
	memset(value, 'x', sizeof(value));
	raio_prep_getxattr(&iocb, fd, &args, path, "user.test", value, sizeof(value));
	EQ(run_iocb(ctx, &iocb), 6);
	CHECK(!memcmp(value, "longerx", 7));
	raio_prep_getxattr(&iocb, fd, &args, path, "user.test", value, 5);
	EQ(run_iocb(ctx, &iocb), -ERANGE);
	raio_prep_getxattr(&iocb, fd, &args, path, "user.test", NULL, 0);
	EQ(run_iocb(ctx, &iocb), 6);
	raio_prep_getxattr(&iocb, fd, &args, path, "user.none", value, sizeof(value));
	EQ(run_iocb(ctx, &iocb), 0);
	raio_prep_removexattr(&iocb, fd, &args, path, "user.none");
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(run_iocb(ctx, &iocb), -ENODATA);
	memset(value, 'x', sizeof(value));
	raio_prep_listxattr(&iocb, fd, &args, path, value, sizeof(value));
	EQ(run_iocb(ctx, &iocb), 10);
	CHECK(!memcmp(value, "user.test\0x", 11));
	raio_prep_listxattr(&iocb, fd, &args, path, NULL, 0);
	EQ(run_iocb(ctx, &iocb), 10);
	raio_prep_listxattr(&iocb, fd, &args, path, value, 9);
	EQ(run_iocb(ctx, &iocb), -ERANGE);
	raio_prep_listxattr(&iocb, fd, &args, path, NULL, 9);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_getxattr(&iocb, fd, &args, path, NULL, value, sizeof(value));
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_getxattr(&iocb, fd, &args, path, "user.test", NULL, 9);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_setxattr(&iocb, fd, &args, path, "user.test", NULL, 9, 0);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_setxattr(&iocb, fd, &args, path, "user.test", "x", 1, 1u << 2);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	EQ(raio_destroy(ctx), 0);
}

static void directories_as_iocbs(int fd, int other)
{
	enum { FILES = 1000 };
	static unsigned char found[FILES];
	char path[PATH_BYTES], name[PATH_BYTES / 2];
	struct raio_path_args args, begun_args;
	struct raio_iocb iocb, begun, *io = &iocb;
	struct raio_dirent entry;
	struct raio_event event;
	raio_context_t ctx = NULL;
	raio_dir_t dir = NULL, second, later[16];
	int i, n, pages = 0;

	EQ(raio_setup(fd, 4, &ctx), 0);
	EQ(raio_mkdir(fd, beneath(path, "listed"), 0700), 0);
	raio_prep_opendir(&iocb, fd, &args, path, &dir);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(raio_readdir(dir, &entry, sizeof(entry)), 0);
	raio_prep_readdir(&iocb, fd, &args, dir);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(raio_closedir(dir), 0);
	for (i = 0; i < FILES; i++) {
		snprintf(name, sizeof(name), "listed/%d-%0100d", i, 0);
		EQ(raio_put(fd, beneath(path, name), "0123456789", (size_t)i % 10, 0600, 0), 0);
	}
	beneath(path, "listed");
	raio_prep_opendir(&iocb, fd, &args, path, &dir);
	for (n = (int)run_iocb(ctx, &iocb); n > 0; n = (int)run_iocb(ctx, &iocb)) {
		pages++;
		while (n-- > 0) {
			EQ(raio_readdir(dir, &entry, sizeof(entry)), 1);
			i = atoi(entry.name);
			CHECK(i >= 0 && i < FILES && !found[i]++);
			EQ(entry.file_bytes, i % 10);
		}
		raio_prep_readdir(&iocb, fd, &args, dir);
	}
	EQ(n, 0);
	CHECK(pages > 1);
	CHECK(is_all(found, FILES, 1));
	EQ(raio_readdir(dir, &entry, sizeof(entry)), 0);
	EQ(raio_closedir(dir), 0);
	/* One that an iocb reads; and one that is closed meanwhile. */
	for (i = 0; i < 2; i++) {
		raio_prep_opendir(&iocb, fd, &args, path, &dir);
		n = (int)run_iocb(ctx, &iocb);
		CHECK(n > 0 && n < FILES);
		raio_prep_readdir(&iocb, fd, &args, dir);
		EQ(raio_submit(ctx, 1, &io), 1);
		FAILS(raio_readdir(dir, &entry, sizeof(entry)), EBUSY);
		raio_prep_readdir(&begun, fd, &begun_args, dir);
		io = &begun;
		EQ(raio_submit(ctx, 1, &io), -EBUSY);
		io = &iocb;
		if (i == 1)
			EQ(raio_closedir(dir), 0);
		EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
		CHECK((long)event.res > n);
		if (i == 0) {
			EQ(raio_readdir(dir, &entry, sizeof(entry)), 1);
			EQ(raio_closedir(dir), 0);
		}
	}
	/* One whose iocb fails has no more entries. */
	raio_prep_opendir(&iocb, fd, &args, path, &dir);
	CHECK(run_iocb(ctx, &iocb) > 0);
	for (i = 0; i < 16; i++) {
		raio_prep_opendir(&iocb, fd, &args, path, &later[i]);
		CHECK(run_iocb(ctx, &iocb) > 0);
	}
	raio_prep_readdir(&iocb, fd, &args, dir);
	EQ(run_iocb(ctx, &iocb), -ESTALE);
	EQ(raio_readdir(dir, &entry, sizeof(entry)), 0);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	EQ(raio_closedir(dir), 0);
	for (i = 0; i < 16; i++)
		EQ(raio_closedir(later[i]), 0);

	raio_prep_opendir(&iocb, fd, &args, "/", &dir);
	CHECK(run_iocb(ctx, &iocb) >= 4);
	/* It goes on in its own session alone, and with the call. */
	raio_prep_readdir(&iocb, other, &args, dir);
	EQ(raio_submit(ctx, 1, &io), -EBADF);
	EQ(raio_readdir(dir, &entry, sizeof(entry)), 1);
	EQ(raio_closedir(dir), 0);
	second = raio_opendir(other, path);
	MUST(second != NULL);
	raio_prep_readdir(&iocb, fd, &args, second);
	EQ(raio_submit(ctx, 1, &io), -EBADF);
	EQ(raio_readdir(second, &entry, sizeof(entry)), 1);
	EQ(raio_closedir(second), 0);
	raio_prep_readdir(&iocb, fd, &args, second);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_readdir(&iocb, fd, &args, NULL);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	raio_prep_opendir(&iocb, fd, &args, path, NULL);
	EQ(raio_submit(ctx, 1, &io), -EINVAL);
	dir = NULL;
	raio_prep_opendir(&iocb, fd, &args, "/ro/data.bin", &dir);
	EQ(run_iocb(ctx, &iocb), -ENOTDIR);
	CHECK(!dir);
	/* Events that are not collected. */
	raio_prep_opendir(&iocb, fd, &args, path, &dir);
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(raio_destroy(ctx), 0);
}

int main(int argc, char **argv)
{
	struct raio_dirent entry;
	raio_dir_t dir;
	int fd, other;

	begin(argc, argv);
	fd = session(argv);
	other = session(argv);
	fresh_path(top, sizeof(top), "names");
	MUST(raio_mkdir(fd, top, 0755) == 0);
	EQ(raio_open(fd, "/ro/data.bin", O_RDONLY), 0);
	small_files_in_one_call(fd);
	names_are_made_changed_and_removed(fd);
	extended_attributes(fd);
	directories_are_listed(fd);
	what_is_done_to_an_open_file(fd);
	all_of_it_as_iocbs(fd);
	attributes_as_iocbs(fd);
	directories_as_iocbs(fd, other);
	/* What is listed when the session ends fails, and can be closed. */
	dir = raio_opendir(other, top);
	MUST(dir != NULL);
	EQ(raio_stop(other), 0);
	while (raio_readdir(dir, &entry, sizeof(entry)) == 1)
		;
	EQ(raio_closedir(dir), 0);
	FAILS(raio_mkdir(other, top, 0700), EBADF);
	EQ(raio_stop(fd), 0);
	return finish("names");
}
