package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

const (
	// abi is the newest version of Landlock's ABI that is used.
	abi = 8

	readFile = ll.AccessFSReadFile | ll.AccessFSReadDir
	editFile = ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate
	// editFolder is what the process does in the folder of the control sockets.
	editFolder = editFile | ll.AccessFSReadDir | ll.AccessFSMakeReg | ll.AccessFSMakeSock | ll.AccessFSRemoveFile
)

const tunDevice = "/dev/net/tun"

// systemFiles are read while the process runs: what netlink does not tell of the kernel's state, the
// metrics of the process, and what loading eBPF programs takes.
var systemFiles = []string{
	"/proc/self", "/proc/stat", "/proc/sys/net", "/proc/modules", "/sys/devices/system/cpu", "/sys/kernel/btf",
}

// interfaceFiles are written to set rps_cpus of TUN devices.
const interfaceFiles = "/sys/devices/virtual/net"

// resolvConf, hosts and nsswitch.conf are read by Go's resolver.
var resolverFiles = []string{resolvConf, "/etc/hosts", "/etc/nsswitch.conf"}

const resolvConf = "/etc/resolv.conf"

// dnsPort is the port of name servers: resolv.conf can give no other.
const dnsPort = 53

// pinned keeps the kernel's dentries of files in /proc that rules are about. When memory is short it
// would forget them, and make new ones, which no rule is about.
var pinned []int

// restrictFiles restricts all threads to the files of p, and to TCP connections to port 53. It returns the
// version of the ABI, and what of p.Read is readable.
func restrictFiles(p Policy) (version int, readable []string, err error) {
	if version, err = ll.LandlockGetABIVersion(); err != nil || version < 1 {
		return 0, nil, errors.New("this kernel does not have it: it is built without, or lsm= leaves it out")
	}
	rules := []landlock.Rule{landlock.ConnectTCP(dnsPort)}
	allow := func(access landlock.AccessFSSet, paths ...string) {
		for _, path := range paths {
			info, err := os.Stat(path)
			if err != nil {
				continue
			}
			if !info.IsDir() {
				access &= editFile | ll.AccessFSIoctlDev
			}
			rules = append(rules, landlock.PathAccess(access, path).IgnoreIfMissing())
		}
	}
	for _, path := range systemFiles {
		if strings.HasPrefix(path, "/proc/") {
			if fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0); err == nil {
				pinned = append(pinned, fd)
			}
		}
		allow(readFile, path)
	}
	if p.Sysctls {
		allow(editFile|ll.AccessFSReadDir, "/proc/sys/net")
	}
	allow(editFile|ll.AccessFSReadDir, interfaceFiles)
	allow(editFile|ll.AccessFSIoctlDev, tunDevice)
	allow(editFolder, p.RuntimeDir)
	allow(ll.AccessFSRemoveFile, p.Remove...)
	for _, path := range resolverFiles {
		allow(readFile, path)
		allow(readFile, resolverFolders(path)...)
	}
	readable = Readable(p.Read...)
	if dir := filepath.Dir(resolvConf); p.Names && replaced(resolvConf) && !slices.Contains(readable, dir) {
		readable = append(readable, dir)
	}
	allow(readFile, readable...)
	c := landlock.Config{HandledAccessFS: landlock.V8.HandledAccessFS, HandledAccessNet: landlock.V8.HandledAccessNet}
	if !p.AbstractSockets {
		c.Scoped = 1 // LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET; seccomp restricts signals, by thread group
	}
	return min(version, abi), readable, c.BestEffort().Restrict(rules...)
}

// resolverFolders returns the folder in /run that a file of the resolver is a symbolic link into, where
// systemd-resolved, resolvconf or NetworkManager replaces it.
func resolverFolders(path string) []string {
	if target, err := filepath.EvalSymlinks(path); err == nil && strings.HasPrefix(target, "/run/") && filepath.Dir(target) != "/run" {
		return []string{filepath.Dir(target)}
	}
	return nil
}

// replaced reports whether path is a file that a DHCP client may replace, by rename(2) in its folder.
func replaced(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular() && !mountPoint(path)
}

// mountPoint reports whether something is mounted at path: it is then not replaced, as in a container.
func mountPoint(path string) bool {
	var file, folder unix.Statx_t
	const mask = unix.STATX_MNT_ID
	err := errors.Join(unix.Statx(unix.AT_FDCWD, path, 0, mask, &file), unix.Statx(unix.AT_FDCWD, filepath.Dir(path), 0, mask, &folder))
	return err == nil && file.Mask&folder.Mask&mask != 0 && file.Mnt_id != folder.Mnt_id
}
