#!/bin/bash
# boot.sh ROOT GROUP: systemd as process 1 of ROOT, in PID, mount, UTS, IPC and cgroup namespaces of its own, and the
# caller's network namespace. ROOT stays as it is. GROUP is a name for a cgroup.
set -e
export ROOT=$1
dir=$(mktemp -d)
mount --make-rprivate /
mount -t cgroup2 none "$dir"
mkdir -p "$dir/$2"
echo $$ >"$dir/$2/cgroup.procs"
umount "$dir"
rmdir "$dir"
# shellcheck disable=SC2016 # the inner shell expands them
exec unshare --pid --fork --mount --uts --ipc --cgroup --kill-child bash -ec '
mount --make-rprivate /
mount -t tmpfs none /mnt
mkdir /mnt/{upper,work,root}
mount -t overlay -o "lowerdir=$ROOT,upperdir=/mnt/upper,workdir=/mnt/work" none /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 none sys/fs/cgroup
for d in run tmp dev; do mount -t tmpfs none $d; done
for d in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do set -- $d; mknod -m 666 dev/$1 c $2 $3; done
mkdir dev/pts dev/shm dev/net
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mknod -m 666 dev/net/tun c 10 200 # as udev has it
mkdir -p run/old
pivot_root . run/old
umount -l /run/old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=basic.target --show-status=no </dev/null'
