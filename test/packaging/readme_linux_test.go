package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// The commands of README.md's section "Install", then those of docs/install.md for hosts without packages, work in a clean
// clone, in a Debian with nothing beside its base but make, Go and the modules, without network.
func TestReadme(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: chroot")
	}
	needs(t, "git", "go", "unshare")
	tree, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	clone := filepath.Join(t.TempDir(), "ipipd")
	c := exec.Command("git", "-c", "safe.directory=*", "clone", "--quiet", "--no-hardlinks", tree, clone)
	c.Env = append(os.Environ(), "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*")
	if out, err := c.CombinedOutput(); err != nil {
		t.Skipf("git clone: %v: %s", err, out)
	}
	folders, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	script := `set -e
r=$1; shift
mount -t tmpfs none /mnt; mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o "lowerdir=$r,upperdir=/mnt/upper,workdir=/mnt/work" none /mnt/root
cd /mnt/root
for d in usr/local/go modules cache src; do mkdir -p $d; mount --bind "$1" $d; shift; done
mount --rbind /dev dev; mount -t proc none proc; mount -t sysfs none sys; mount -t tmpfs none run
exec chroot . env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin GOPROXY=off GOTOOLCHAIN=local GOFLAGS=-modcacherw \
	GOMODCACHE=/modules GOCACHE=/cache sh -ec "cd /src
$1"`
	commands := block(t, "README.md", "Go and make build it:\n\n((?:    .*\n)+)") +
		"echo \"installed: $(/usr/local/bin/ipipd version | head -n 1)\"\n" +
		block(t, "docs/install.md", "## Without packages\n\n```.*\n((?s:.*?))```") +
		"echo \"left: $(find /usr/local -path /usr/local/go -prune -o -name '*ipipd*' -print)\"\n"
	args := append([]string{"--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "-", root(t)}, strings.Fields(string(folders))...)
	c = exec.Command("unshare", append(args, clone, commands)...)
	log := &netlab.Buffer{}
	c.Stdout, c.Stderr = log, log
	netlab.New(t).Start(c)
	if err := c.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	t.Logf("%v of user time, %v of system time", c.ProcessState.UserTime(), c.ProcessState.SystemTime())
	for _, want := range []string{"icmp_seq=3 ", "rx-packet: [1-9]", "hosts, cables and interfaces are gone", "installed: ipipd ", "left: \n"} {
		if !regexp.MustCompile(want).MatchString(log.String()) {
			t.Errorf("%q is missing in\n%s", want, log)
		}
	}
}

// block returns what the group of a pattern matches in a file of the tree, without indentation.
func block(t *testing.T, file, pattern string) string {
	t.Helper()
	text, err := os.ReadFile("../../" + file)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindSubmatch(text)
	if m == nil {
		t.Fatalf("%s has nothing like %q", file, pattern)
	}
	return strings.ReplaceAll("\n"+string(m[1]), "\n    ", "\n")
}
