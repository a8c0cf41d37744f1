/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pins the binary interface on 64-bit Linux: the size of each struct, where each member lies, and each value that
 * programs have compiled in. A line that fails here is a change of the soname, not of this file.
 */
#include <stddef.h>
#include <libraio.h>

#define PIN(name, condition) typedef char pin_##name[(condition) ? 1 : -1]
#define SIZE(type, bytes) PIN(size_of_##type, sizeof(struct type) == (bytes))
#define AT(type, member, offset)                                                                                   \
	PIN(type##_##member, offsetof(struct type, member) == (offset));                                           \
	PIN(type##_##member##_fits, offsetof(struct type, member) + sizeof(((struct type *)0)->member) <=          \
					    sizeof(struct type))
#define WIDTH(type, member, bytes) PIN(width_of_##type##_##member, sizeof(((struct type *)0)->member) == (bytes))

SIZE(raio_iocb_common, 40);
AT(raio_iocb_common, buf, 0);
AT(raio_iocb_common, nbytes, 8);
AT(raio_iocb_common, offset, 16);
AT(raio_iocb_common, mr, 24);
AT(raio_iocb_common, flags, 32);
AT(raio_iocb_common, resfd, 36);
WIDTH(raio_iocb_common, nbytes, 8);
WIDTH(raio_iocb_common, offset, 8);
WIDTH(raio_iocb_common, flags, 4);
WIDTH(raio_iocb_common, resfd, 4);

SIZE(raio_iocb, 64);
AT(raio_iocb, data, 0);
AT(raio_iocb, key, 8);
AT(raio_iocb, raio_fildes, 12);
AT(raio_iocb, raio_lio_opcode, 16);
AT(raio_iocb, pad, 20);
AT(raio_iocb, crc, 20);
AT(raio_iocb, u, 24);
PIN(raio_iocb_u_c, offsetof(struct raio_iocb, u.c) == 24);

SIZE(raio_event, 40);
AT(raio_event, data, 0);
AT(raio_event, obj, 8);
AT(raio_event, handle, 16);
AT(raio_event, res, 24);
AT(raio_event, res2, 32);

SIZE(raio_options, 64);
AT(raio_options, size, 0);
AT(raio_options, flags, 4);
AT(raio_options, queue_depth, 8);
AT(raio_options, connect_timeout_ms, 12);
AT(raio_options, request_timeout_ms, 16);
AT(raio_options, spin_us, 20);
AT(raio_options, reconnect_ms, 24);
AT(raio_options, call_timeout_ms, 28);
AT(raio_options, reserved, 32);
WIDTH(raio_options, reserved, 32);

SIZE(raio_stats, 152);
AT(raio_stats, size, 0);
AT(raio_stats, submitted, 8);
AT(raio_stats, completed, 16);
AT(raio_stats, failed, 24);
AT(raio_stats, bytes_read, 32);
AT(raio_stats, bytes_written, 40);
AT(raio_stats, bounced_bytes, 48);
AT(raio_stats, sends, 56);
AT(raio_stats, receives, 64);
AT(raio_stats, sleeps, 72);
AT(raio_stats, reconnects, 80);
AT(raio_stats, in_flight, 88);
AT(raio_stats, queue_depth, 96);
AT(raio_stats, io_bytes_max, 104);
AT(raio_stats, resent, 112);
AT(raio_stats, unknown, 120);
AT(raio_stats, lost, 128);
AT(raio_stats, checksum_errors, 136);
AT(raio_stats, crc, 144);

SIZE(raio_stat, 120);
AT(raio_stat, size, 0);
AT(raio_stat, file_bytes, 8);
AT(raio_stat, blocks, 16);
AT(raio_stat, inode, 24);
AT(raio_stat, device, 32);
AT(raio_stat, rdevice, 40);
AT(raio_stat, accessed_ns, 48);
AT(raio_stat, modified_ns, 56);
AT(raio_stat, changed_ns, 64);
AT(raio_stat, mode, 72);
AT(raio_stat, links, 76);
AT(raio_stat, uid, 80);
AT(raio_stat, gid, 84);
AT(raio_stat, block_bytes, 88);
AT(raio_stat, direct_align, 92);
AT(raio_stat, identity, 96);
AT(raio_stat, verifier, 112);
WIDTH(raio_stat, identity, 16);

SIZE(raio_path_args, 80);
AT(raio_path_args, path, 0);
AT(raio_path_args, other, 8);
AT(raio_path_args, buf, 16);
AT(raio_path_args, nbytes, 24);
AT(raio_path_args, stat, 32);
AT(raio_path_args, stat_size, 40);
AT(raio_path_args, modified_ns, 48);
AT(raio_path_args, flags, 56);
AT(raio_path_args, mode, 60);
AT(raio_path_args, reserved, 64);

SIZE(raio_statfs, 64);
AT(raio_statfs, size, 0);
AT(raio_statfs, block_bytes, 8);
AT(raio_statfs, blocks, 16);
AT(raio_statfs, blocks_free, 24);
AT(raio_statfs, blocks_available, 32);
AT(raio_statfs, files, 40);
AT(raio_statfs, files_free, 48);
AT(raio_statfs, name_bytes_max, 56);

SIZE(raio_copy_args, 32);
AT(raio_copy_args, fd, 0);
AT(raio_copy_args, reserved_0, 4);
AT(raio_copy_args, offset, 8);
AT(raio_copy_args, reserved, 16);

SIZE(raio_checksum, 40);
AT(raio_checksum, type, 0);
AT(raio_checksum, crc32c, 4);
AT(raio_checksum, blake3, 8);
WIDTH(raio_checksum, blake3, 32);

SIZE(raio_extent, 16);
AT(raio_extent, offset, 0);
AT(raio_extent, length, 8);

SIZE(raio_dirent, 296);
AT(raio_dirent, size, 0);
AT(raio_dirent, file_bytes, 8);
AT(raio_dirent, modified_ns, 16);
AT(raio_dirent, inode, 24);
AT(raio_dirent, mode, 32);
AT(raio_dirent, has_status, 36);
AT(raio_dirent, name, 40);
WIDTH(raio_dirent, name, 256);

PIN(pread, RAIO_CMD_PREAD == 0);
PIN(pwrite, RAIO_CMD_PWRITE == 1);
PIN(preadv, RAIO_CMD_PREADV == 2);
PIN(pwritev, RAIO_CMD_PWRITEV == 3);
PIN(fsync, RAIO_CMD_FSYNC == 4);
PIN(discard, RAIO_CMD_DISCARD == 5);
PIN(write_zeroes, RAIO_CMD_WRITE_ZEROES == 6);
PIN(allocate, RAIO_CMD_ALLOCATE == 7);
PIN(open, RAIO_CMD_OPEN == 8);
PIN(close, RAIO_CMD_CLOSE == 9);
PIN(stat_fd, RAIO_CMD_STAT_FD == 10);
PIN(ftruncate, RAIO_CMD_FTRUNCATE == 11);
PIN(stat_path, RAIO_CMD_STAT_PATH == 12);
PIN(get, RAIO_CMD_GET == 13);
PIN(put, RAIO_CMD_PUT == 14);
PIN(mkdir, RAIO_CMD_MKDIR == 15);
PIN(rmdir, RAIO_CMD_RMDIR == 16);
PIN(unlink, RAIO_CMD_UNLINK == 17);
PIN(rename, RAIO_CMD_RENAME == 18);
PIN(link, RAIO_CMD_LINK == 19);
PIN(symlink, RAIO_CMD_SYMLINK == 20);
PIN(readlink, RAIO_CMD_READLINK == 21);
PIN(set_attributes, RAIO_CMD_SET_ATTRIBUTES == 22);
PIN(statfs, RAIO_CMD_STATFS == 23);
PIN(getxattr, RAIO_CMD_GETXATTR == 24);
PIN(setxattr, RAIO_CMD_SETXATTR == 25);
PIN(listxattr, RAIO_CMD_LISTXATTR == 26);
PIN(removexattr, RAIO_CMD_REMOVEXATTR == 27);
PIN(opendir, RAIO_CMD_OPENDIR == 28);
PIN(readdir, RAIO_CMD_READDIR == 29);
PIN(copy_file_range, RAIO_CMD_COPY_FILE_RANGE == 30);
PIN(checksum, RAIO_CMD_CHECKSUM == 31);
PIN(flock, RAIO_CMD_FLOCK == 32);
PIN(crc32c, RAIO_CHECKSUM_CRC32C == 1);
PIN(blake3, RAIO_CHECKSUM_BLAKE3 == 2);
PIN(path_nofollow, RAIO_PATH_NOFOLLOW == 1);
PIN(put_excl, RAIO_PUT_EXCL == 2);
PIN(put_fsync, RAIO_PUT_FSYNC == 4);
PIN(put_mtime, RAIO_PUT_MTIME == 8);
PIN(rename_noreplace, RAIO_RENAME_NOREPLACE == 2);
PIN(xattr_create, RAIO_XATTR_CREATE == 2);
PIN(set_mtime, RAIO_SET_MTIME == 8);
PIN(set_mode, RAIO_SET_MODE == 16);
PIN(set_size, RAIO_SET_SIZE == 32);
PIN(opcode_width, sizeof(enum raio_iocb_cmd) == 4);

PIN(eventfd, RAIO_IOCB_EVENTFD == 1);
PIN(datasync, RAIO_IOCB_DATASYNC == 2);
PIN(keep_size, RAIO_IOCB_KEEP_SIZE == 4);
PIN(iocb_crc, RAIO_IOCB_CRC == 8);
PIN(iocb_timeout, RAIO_IOCB_TIMEOUT_MS(3) == 3 << 12);
PIN(iocb_timeout_max, RAIO_IOCB_TIMEOUT_MS(RAIO_IOCB_TIMEOUT_MAX) == 0xfffff000u);
PIN(res2_transport, RAIO_RES2_TRANSPORT == 1);
PIN(res2_protocol, RAIO_RES2_PROTOCOL == 2);
PIN(res2_storage, RAIO_RES2_STORAGE == 3);
PIN(res2_policy, RAIO_RES2_POLICY == 4);
PIN(res2_class, RAIO_RES2_CLASS == 0xff);
PIN(res2_retryable, RAIO_RES2_RETRYABLE == 0x100);
PIN(opt_crc, RAIO_OPT_CRC == 1);
PIN(res2_unknown, RAIO_RES2_UNKNOWN == 0x200);
PIN(res2_lost, RAIO_RES2_LOST == 0x400);
PIN(opt_no_spin, RAIO_OPT_NO_SPIN == 2);
PIN(opt_redo, RAIO_OPT_REDO == 4);
PIN(opt_no_reconnect, RAIO_OPT_NO_RECONNECT == 8);
PIN(opt_no_crc, RAIO_OPT_NO_CRC == 16);
PIN(opt_no_keys, RAIO_OPT_NO_KEYS == 32);
PIN(opt_fd_always, RAIO_OPT_FD_ALWAYS == 64);
PIN(abi_major, RAIO_ABI_MAJOR == 0);
PIN(abi_version, RAIO_ABI_VERSION == ((RAIO_ABI_MAJOR << 16) | RAIO_ABI_MINOR));

int main(void)
{
	return 0;
}
