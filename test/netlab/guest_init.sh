#!/bin/sh
# The first process of a guest (see guest_linux.go). Its root is the host's own
# file system, read-only; its NIC is vec0; GUEST_SHARE is a folder of the host
# that it may write to. The host says on the serial line which script of that
# folder to run, and hears there how it went: its outputs are in the folder.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t hostfs -o "$GUEST_SHARE" hostfs /mnt
# Nothing here may wait for a module loader that cannot work.
echo /bin/true >/proc/sys/kernel/modprobe
exec 3<>/dev/ttyS0
stty raw -echo <&3
echo "ready $(uname -r)" >&3

while read -r id seconds <&3; do
	{
		cd /mnt || exit
		timeout -k 1 "$seconds" sh "./$id.sh" >"$id.out" 2>"$id.err" </dev/null
		echo "$id $?" >&3
	} &
done
# The host has hung up. The end of the first process would be a panic.
echo o >/proc/sysrq-trigger
sleep 60
