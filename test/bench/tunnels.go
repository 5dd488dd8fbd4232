package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// maxInner is the largest inner packet of RFC 2003 in bytes: 65535 - 20.
const maxInner = 65515

// A tunnel is a row of the table. start configures both ends with their inner addresses; it
// need not wait until they are ready.
type tunnel struct {
	name  string // as in -only
	title string // as in the table
	mtu   int    // inner
	needs []string
	start func(ctx context.Context, b *bench) error
}

// allTunnels are in the order of the table: the link itself, the kernel's tunnel, those in
// userspace, and those with an inner MTU far above the link's, where the kernel fragments.
var allTunnels = []tunnel{
	{"bare", "the bare link", 1500, nil, startBare},
	{"vxlan", "kernel VXLAN", 1450, nil, startVXLAN},
	{"vxlan-rps", "kernel VXLAN, RPS to all processors", 1450, nil, startVXLANWithRPS},
	{"wireguard-go", "wireguard-go (encrypts)", 1420, []string{"wireguard-go", "wg"}, startWireguard},
	{"fastd", "fastd, no cipher", 1450, []string{"fastd"}, startFastd},
	{"openvpn", "OpenVPN, no cipher", 1500, []string{"openvpn"}, startOpenVPN},
	{"socat", "socat, protocol 4", 1480, []string{"socat"}, startSocat(1480)},
	{"ipipd", "ipipd", 1480, []string{"ipipd"}, startIpipd("ipipd")},
	{"ipipd-rps", "ipipd --rps all", 1480, []string{"ipipd"}, startIpipd("ipipd", "--rps", "all")},
	{"ipipd-userspace", "ipipd --allow-fast-path no", 1480, []string{"ipipd"}, startIpipd("ipipd", userspace...)},
	{"ipipd-sends-fast", "ipipd, fast to userspace", 1480, []string{"ipipd"}, startIpipds("ipipd", nil, userspace)},
	{"ipipd-receives-fast", "ipipd, userspace to fast", 1480, []string{"ipipd"}, startIpipds("ipipd", userspace, nil)},
	{"ipipd-gcm", "ipipd, encrypts: AES-256-GCM", 1446, []string{"ipipd"}, startIpipd("ipipd", encrypted("aes256gcm16")...)},
	{"ipipd-cbc", "ipipd, encrypts: AES-256-CBC, SHA1", 1438, []string{"ipipd"}, startIpipd("ipipd", encrypted("aes256-sha1")...)},
	{"older", "the older ipipd", 1480, []string{"older"}, startIpipd("older")},
	{"older-userspace", "the older ipipd --allow-fast-path no", 1480, []string{"older"}, startIpipd("older", userspace...)},
	{"older-gcm", "the older ipipd, encrypts: AES-256-GCM", 1446, []string{"older"}, startIpipd("older", encrypted("aes256gcm16")...)},
	{"socat-65515", "socat, MTU 65515", maxInner, []string{"socat"}, startSocat(maxInner)},
	{"ipipd-65515", "ipipd --mtu 65515", maxInner, []string{"ipipd"}, startIpipd("ipipd", "--mtu", strconv.Itoa(maxInner))},
}

var userspace = []string{"--allow-fast-path", "no"}

func tunnelNames() []string {
	var names []string
	for _, t := range allTunnels {
		names = append(names, t.name)
	}
	return names
}

// findPrograms looks up the programs of the measurements and of the tunnels. wireguard-go,
// which few systems package, is built from its module.
func (b *bench) findPrograms(ctx context.Context) error {
	for _, program := range []string{"ip", "ping", "iperf3", "ethtool"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%s is not installed: scripts/need peers installs what the benchmark needs", program)
		}
	}
	b.tools = map[string]string{}
	for _, program := range []string{"socat", "fastd", "openvpn", "wg", "wireguard-go"} {
		if path, err := exec.LookPath(program); err == nil {
			b.tools[program] = path
		}
	}
	for program, path := range map[string]string{"ipipd": b.ipipd, "older": b.older} {
		if _, err := os.Stat(path); err == nil {
			b.tools[program] = path
		}
	}
	if b.tools["wireguard-go"] != "" || !strings.Contains(strings.Join(b.only, ","), "wireguard-go") {
		return nil
	}
	// Its main package is the module's root, so the binary is called wireguard.
	if path, err := exec.LookPath("wireguard"); err == nil {
		b.tools["wireguard-go"] = path
		return nil
	}
	fmt.Println("building wireguard-go")
	cmd := exec.CommandContext(ctx, "go", "install", "golang.zx2c4.com/wireguard@latest")
	cmd.Env = append(os.Environ(), "GOBIN="+b.lab.dir, "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Println("cannot build wireguard-go:", lastLine(out))
	} else {
		b.tools["wireguard-go"] = filepath.Join(b.lab.dir, "wireguard")
	}
	return ctx.Err()
}

func startBare(ctx context.Context, b *bench) error {
	for _, side := range sides {
		if err := b.lab.ip(ctx, side, "addr", "add", innerAddress[side]+"/24", "dev", "veth0"); err != nil {
			return err
		}
	}
	return nil
}

func startVXLAN(ctx context.Context, b *bench) error {
	for _, side := range sides {
		err := b.lab.ip(ctx, side, "link", "add", "t0", "type", "vxlan", "id", "7", "dstport", "4789",
			"local", outerAddress[side], "remote", outerAddress[otherSide[side]], "dev", "veth0")
		if err != nil {
			return err
		}
	}
	return b.configure(ctx, "t0", 1450)
}

// startVXLANWithRPS sets rps_cpus of its interfaces as ipipd --rps all does.
func startVXLANWithRPS(ctx context.Context, b *bench) error {
	if err := startVXLAN(ctx, b); err != nil {
		return err
	}
	const set = `printf %x $(((1 << $(nproc --all)) - 1)) >/sys/class/net/t0/queues/rx-0/rps_cpus`
	for _, side := range sides {
		if err := b.lab.run(ctx, side, "sh", "-c", set); err != nil {
			return err
		}
	}
	return nil
}

func startWireguard(ctx context.Context, b *bench) error {
	// Its control socket is named after the interface in a directory that all namespaces
	// share: the name must be unique.
	device := fmt.Sprintf("bwg%d", os.Getpid())
	keys := map[string]string{}
	public := map[string]string{}
	for _, side := range sides {
		key, err := output(ctx, b.tools["wg"], "genkey")
		if err != nil {
			return err
		}
		keys[side] = filepath.Join(b.lab.dir, "wg."+side)
		if err := os.WriteFile(keys[side], key, 0o600); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, b.tools["wg"], "pubkey")
		cmd.Stdin = bytes.NewReader(key)
		pub, err := cmd.Output()
		if err != nil {
			return err
		}
		public[side] = strings.TrimSpace(string(pub))
		err = b.lab.spawn(side, []string{"WG_PROCESS_FOREGROUND=1"}, b.tools["wireguard-go"], "-f", device+side)
		if err != nil {
			return err
		}
	}
	for _, side := range sides {
		if err := b.awaitDevice(ctx, side, device+side); err != nil {
			return err
		}
		// The control socket appears shortly after the device.
		if err := wait(ctx, 500*time.Millisecond); err != nil {
			return err
		}
		err := b.lab.run(ctx, side, b.tools["wg"], "set", device+side, "private-key", keys[side], "listen-port", "51820",
			"peer", public[otherSide[side]], "endpoint", outerAddress[otherSide[side]]+":51820", "allowed-ips", "0.0.0.0/0")
		if err != nil {
			return err
		}
		if err := b.configureSide(ctx, side, device+side, 1420); err != nil {
			return err
		}
	}
	return nil
}

func startFastd(ctx context.Context, b *bench) error {
	secret := map[string]string{}
	public := map[string]string{}
	for _, side := range sides {
		out, err := exec.CommandContext(ctx, b.tools["fastd"], "--generate-key").CombinedOutput()
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(out)) {
			switch f := strings.Fields(line); {
			case len(f) == 2 && f[0] == "Secret:":
				secret[side] = f[1]
			case len(f) == 2 && f[0] == "Public:":
				public[side] = f[1]
			}
		}
	}
	for _, side := range sides {
		peer := otherSide[side]
		conf := fmt.Sprintf(`log level warn; mode tun; interface "t0"; method "null"; mtu 1450;
bind %s:10000; secret "%s";
peer "p" { key "%s"; remote %s:10000; }
`, outerAddress[side], secret[side], public[peer], outerAddress[peer])
		path := filepath.Join(b.lab.dir, "fastd."+side+".conf")
		if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
			return err
		}
		if err := b.lab.spawn(side, nil, b.tools["fastd"], "-c", path); err != nil {
			return err
		}
	}
	return b.configure(ctx, "t0", 1450)
}

func startOpenVPN(_ context.Context, b *bench) error {
	for _, side := range sides {
		peer := otherSide[side]
		err := b.lab.spawn(side, nil, b.tools["openvpn"], "--dev", "t0", "--dev-type", "tun",
			"--local", outerAddress[side], "--remote", outerAddress[peer],
			"--ifconfig", innerAddress[side], innerAddress[peer], "--cipher", "none", "--auth", "none")
		if err != nil {
			return err
		}
	}
	return nil
}

func startSocat(mtu int) func(context.Context, *bench) error {
	return func(ctx context.Context, b *bench) error {
		// The buffer has to hold the largest packet. Without DF, so that the kernel fragments.
		for _, side := range sides {
			err := b.lab.spawn(side, nil, b.tools["socat"], "-b", "65536", "TUN,tun-name=t0,iff-up,iff-no-pi",
				fmt.Sprintf("IP4-DATAGRAM:%s:4,bind=%s,ip-mtu-discover=0", outerAddress[otherSide[side]], outerAddress[side]))
			if err != nil {
				return err
			}
		}
		return b.configure(ctx, "t0", mtu)
	}
}

// startIpipd starts the binary that b.tools has under this name.
func startIpipd(program string, flags ...string) func(context.Context, *bench) error {
	return startIpipds(program, flags, flags)
}

// startIpipds is startIpipd with different flags for each end. Bulk TCP goes from a to b.
func startIpipds(program string, a, b []string) func(context.Context, *bench) error {
	flags := map[string][]string{"a": a, "b": b}
	return func(_ context.Context, b *bench) error {
		for _, side := range sides {
			args := append([]string{"up", "--name", "t0", "--address", innerAddress[side] + "/24",
				"--local-address", outerAddress[side], "--remote-address", outerAddress[otherSide[side]],
				"--runtime-dir", filepath.Join(b.lab.dir, "run."+side)}, flags[side]...)
			if err := b.lab.spawn(side, nil, b.tools[program], args...); err != nil {
				return err
			}
		}
		return nil
	}
}

// encrypted returns the flags of an encrypted tunnel.
func encrypted(phase2 string) []string {
	return []string{"--ipsec-secret", "benchmark", "--ipsec-phase2", phase2}
}

// configure sets the address and MTU of the tunnel's device on both hosts.
func (b *bench) configure(ctx context.Context, device string, mtu int) error {
	for _, side := range sides {
		if err := b.awaitDevice(ctx, side, device); err != nil {
			return err
		}
		if err := b.configureSide(ctx, side, device, mtu); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) configureSide(ctx context.Context, side, device string, mtu int) error {
	if err := b.lab.ip(ctx, side, "addr", "replace", innerAddress[side]+"/24", "dev", device); err != nil {
		return err
	}
	return b.lab.ip(ctx, side, "link", "set", device, "mtu", strconv.Itoa(mtu), "up")
}

func (b *bench) awaitDevice(ctx context.Context, side, device string) error {
	for range 50 {
		if b.lab.ip(ctx, side, "link", "show", device) == nil {
			return nil
		}
		if err := wait(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("no interface %s after 5 s", device)
}

// awaitPing waits until the tunnel carries a ping. Some handshakes take seconds.
func (b *bench) awaitPing(ctx context.Context) error {
	for range 15 {
		if b.lab.run(ctx, "a", "ping", "-c", "1", "-W", "1", innerAddress["b"]) == nil {
			return nil
		}
		// ping fails at once while the interface is missing.
		if err := wait(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
	return errors.New("no ping went through it")
}
