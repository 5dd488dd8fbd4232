#!/bin/sh
# init of a guest (see guest_linux.go). Its root is the host's file system, read-only; its
# NIC is vec0; GUEST_SHARE is a directory of the host that it may write to. Each line
# "ID TIMEOUT" from the serial line runs ID.sh of that directory, with its output in ID.out
# and ID.err; the reply is "ID STATUS". Empty lines are ignored.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t hostfs -o "$GUEST_SHARE" hostfs /mnt
# No modprobe: the guest's modules are not in /lib/modules.
echo /bin/true >/proc/sys/kernel/modprobe
exec 3<>/dev/ttyS0
stty raw -echo <&3
echo "ready $(uname -r)" >&3

while read -r id seconds <&3; do
	[ "$id" ] || continue
	{
		cd /mnt || exit
		timeout -k 1 "$seconds" sh "./$id.sh" >"$id.out" 2>"$id.err" </dev/null
		echo "$id $?" >&3
	} &
done
# The host has closed the serial line. Power off: exiting from init would be a panic.
echo o >/proc/sysrq-trigger
sleep 60
