package packaging

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// build runs make packages, and returns the folder with the packages.
func build(t *testing.T, version, packages string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	c := exec.Command("make", "-C", "../..", "packages", "PACKAGEDIR="+dir, "VERSION="+version, "COMMIT=0123abc", "EPOCH=1700000000", "PACKAGES="+packages)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("make packages: %v\n%s", err, out)
	}
	return dir
}

// all names what make packages and make image build.
const all = "deb/amd64 deb/arm64 rpm/amd64 rpm/arm64 image"

var (
	firstOnce sync.Once
	firstDir  string
)

// first returns the folder with the packages of v1.0.0, which are built once for all tests.
func first(t *testing.T) string {
	t.Helper()
	needs(t, "make")
	firstOnce.Do(func() {
		if dir, err := os.MkdirTemp("", "packages"); err == nil && os.CopyFS(dir, os.DirFS(build(t, "v1.0.0", all))) == nil {
			firstDir = dir
		}
	})
	if firstDir == "" {
		t.Fatal("the packages are not built")
	}
	return firstDir
}

func TestMain(m *testing.M) {
	enterContainer()
	status := m.Run()
	os.RemoveAll(firstDir)
	os.Exit(status)
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("packages take long, and have no race: see the run without -short")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: scripts/need test installs it", p)
		}
	}
}

func deb(dir, version string) string {
	return filepath.Join(dir, fmt.Sprintf("ipipd_%s-1_%s.deb", version, runtime.GOARCH))
}

// The same tree gives the same bytes.
func TestPackages_reproducible(t *testing.T) {
	one := first(t)
	two := build(t, "v1.0.0", all)
	files, err := os.ReadDir(one)
	if err != nil || len(files) != 7 {
		t.Fatalf("%v, %v: want two debs, two rpms, two SBOMs and an image", files, err)
	}
	for _, f := range files {
		a, _ := os.ReadFile(filepath.Join(one, f.Name()))
		b, err := os.ReadFile(filepath.Join(two, f.Name()))
		if err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s differs in the second build: %v", f.Name(), err)
		}
	}
}

// wanted are the files that each package has, beside all of packaging/man.
var wanted = []string{
	"/usr/bin/ipipd", "/etc/ipipd", "/etc/ipipd/instances", "/usr/lib/systemd/system/ipipd.service", "/usr/lib/systemd/system/ipipd@.service",
	"/usr/lib/sysusers.d/ipipd.conf", "/usr/lib/NetworkManager/conf.d/90-ipipd.conf", "/usr/lib/systemd/network/90-ipipd.network",
	"/usr/share/bash-completion/completions/ipipd", "/usr/share/zsh/vendor-completions/_ipipd", "/usr/share/fish/vendor_completions.d/ipipd.fish",
	"/usr/share/doc/ipipd/examples/ipipd.yaml", "/usr/share/doc/ipipd/grafana/ipipd.json", "/usr/share/doc/ipipd/prometheus/ipipd.rules.yml", "/usr/share/doc/ipipd/sbom.cdx.json",
}

func TestPackages_contents(t *testing.T) {
	dir := first(t)
	pages, err := filepath.Glob("../../packaging/man/*")
	if err != nil || len(pages) < 10 {
		t.Fatalf("%q, %v", pages, err)
	}
	want := slices.Clone(wanted)
	for _, page := range pages {
		want = append(want, "/usr/share/man/man"+filepath.Ext(page)[1:]+"/"+filepath.Base(page)+".gz")
	}
	for _, p := range []struct {
		file, list, unpack, extcap string
		machine                    elf.Machine
	}{
		{"ipipd_1.0.0-1_amd64.deb", "dpkg-deb --contents %s", "dpkg-deb -x %s .", "/usr/lib/x86_64-linux-gnu/wireshark/extcap/ipipd", elf.EM_X86_64},
		{"ipipd_1.0.0-1_arm64.deb", "dpkg-deb --contents %s", "dpkg-deb -x %s .", "/usr/lib/aarch64-linux-gnu/wireshark/extcap/ipipd", elf.EM_AARCH64},
		{"ipipd-1.0.0-1.x86_64.rpm", "rpm -q -lv -p %s", "rpm2archive - <%s | tar xz", "/usr/lib64/wireshark/extcap/ipipd", elf.EM_X86_64},
		{"ipipd-1.0.0-1.aarch64.rpm", "rpm -q -lv -p %s", "rpm2archive - <%s | tar xz", "/usr/lib64/wireshark/extcap/ipipd", elf.EM_AARCH64},
	} {
		t.Run(p.file, func(t *testing.T) {
			needs(t, strings.Fields(p.list)[0], strings.Fields(p.unpack)[0])
			out, err := exec.Command("sh", "-c", fmt.Sprintf(p.list, filepath.Join(dir, p.file))).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			files := map[string]string{}
			for line := range strings.Lines(string(out)) {
				name, _, _ := strings.Cut(strings.TrimRight(line, "/\n"), " -> ")
				if i := strings.LastIndexAny(name, " "); i >= 0 {
					files[strings.TrimPrefix(name[i+1:], ".")] = line
				}
			}
			for _, w := range append(want, p.extcap) {
				if files[w] == "" {
					t.Errorf("%s is missing", w)
				}
			}
			for _, line := range files {
				if line[0] == 'd' && !strings.HasPrefix(line, "drwxr-x") {
					t.Errorf("a folder that nobody can enter: %s", line)
				}
				if !strings.Contains(line, "root") {
					t.Errorf("not root's: %s", line)
				}
			}

			unpacked := t.TempDir()
			c := exec.Command("sh", "-c", fmt.Sprintf(p.unpack, filepath.Join(dir, p.file)))
			c.Dir = unpacked
			if out, err := c.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", p.unpack, err, out)
			}
			for _, name := range []string{"/usr/bin/ipipd", p.extcap} { // the second leads to the first
				if binary, err := elf.Open(unpacked + name); err != nil || binary.Machine != p.machine {
					t.Errorf("%s: %v, want a program for %v", name, err, p.machine)
				}
			}
		})
	}
}

func TestPackages_lintian(t *testing.T) {
	needs(t, "lintian")
	if out, err := exec.Command("lintian", "--fail-on", "error", "--allow-root", deb(first(t), "1.0.0")).CombinedOutput(); err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

// mandoc finds no error in any manual page.
func TestPackages_man(t *testing.T) {
	needs(t, "mandoc")
	pages, err := filepath.Glob("../../packaging/man/*")
	if err != nil || len(pages) < 10 {
		t.Fatalf("%q, %v", pages, err)
	}
	if out, err := exec.Command("mandoc", append([]string{"-T", "lint", "-W", "error"}, pages...)...).CombinedOutput(); err != nil {
		t.Errorf("mandoc: %v\n%s", err, out)
	}
}

// make uninstall removes what make install has copied.
func TestPackages_makeInstall(t *testing.T) {
	needs(t, "make")
	dest := t.TempDir()
	make := func(target string) {
		t.Helper()
		if out, err := exec.Command("make", "-C", "../..", target, "DESTDIR="+dest, "PREFIX=/opt/ipipd", "VERSION=v1.0.0").CombinedOutput(); err != nil {
			t.Fatalf("make %s: %v\n%s", target, err, out)
		}
	}
	files := func() (all []string) {
		_ = filepath.WalkDir(dest, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				all = append(all, strings.TrimPrefix(path, dest))
			}
			return err
		})
		return all
	}
	make("install")
	if n := len(files()); n < 30 {
		t.Errorf("%d files are installed: %q", n, files())
	}
	unit, err := os.ReadFile(dest + "/opt/ipipd/lib/systemd/system/ipipd.service")
	if err != nil || !bytes.Contains(unit, []byte("ExecStart=/opt/ipipd/bin/ipipd up ")) {
		t.Errorf("the unit is not for PREFIX: %v", err)
	}
	out, err := exec.Command(dest+"/opt/ipipd/bin/ipipd", "version").CombinedOutput()
	if err != nil || !bytes.HasPrefix(out, []byte("ipipd v1.0.0 ")) {
		t.Errorf("%s, %v", out, err)
	}
	make("uninstall")
	if left := files(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// An rpm is installed into a Debian, whose rpm runs its scripts there, upgraded and removed; only the configuration stays.
func TestPackages_rpm(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: chroot")
	}
	needs(t, "make", "rpm", "unshare")
	one, two := first(t), build(t, "v1.0.1", "rpm/"+runtime.GOARCH)
	script := `set -e
mount -t tmpfs none /mnt; mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" none /mnt/root
r=/mnt/root; mount -t tmpfs none $r/run; mkdir -p $r/dev; [ -e $r/dev/null ] || mknod -m 666 $r/dev/null c 1 3
rpm() { command rpm --root $r --dbpath /var/lib/rpm "$@"; }
left() { (cd $r; find etc usr run -xdev -name '*ipipd*' | sort | tr '\n' ' '); }
rpm --initdb
cp "$2"/*.$(uname -m).rpm $r/run/1.rpm; cp "$3"/*.rpm $r/run/2.rpm
rpm -i --nodeps $r/run/1.rpm
echo "installed: $(chroot $r /usr/bin/ipipd version | head -n 1)"
echo "folder: $(stat -c '%a %U' $r/etc/ipipd) $(chroot $r stat -c %G /etc/ipipd)"
echo "user: $(chroot $r getent passwd ipipd | cut -d: -f1)"
echo '# mine' >$r/etc/ipipd/mine.yaml
rpm -U --nodeps $r/run/2.rpm
echo "upgraded: $(chroot $r /usr/bin/ipipd version | head -n 1)"
if rpm -V --nodeps ipipd | grep -v ' /etc/ipipd'; then echo 'verify complains'; fi
rpm -e --nodeps ipipd
echo "left: $(left)"
cat $r/etc/ipipd/mine.yaml`
	out, err := exec.Command("unshare", "--mount", "sh", "-c", script, "-", root(t), one, two).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"installed: ipipd 1.0.0 ", "folder: 2750 root ipipd\n", "user: ipipd\n", "upgraded: ipipd 1.0.1 ", "left: etc/ipipd \n", "# mine\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
	if strings.Contains(string(out), "verify complains") || strings.Contains(string(out), "scriptlet failed") {
		t.Errorf("rpm says\n%s", out)
	}
}
