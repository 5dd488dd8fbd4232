package packaging

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// container has the options with which a container runtime starts the image.
type container struct {
	Args         []string // behind the entry point; nil: those of the image
	Capabilities []string // without CAP_
	ReadOnly     bool
	Mode         os.FileMode // of /run, a tmpfs; 0: none
	TUN          bool        // there is /dev/net/tun
	Probes       []string    // URLs that answer 200 once it is ready

	Root          string // of the unpacked image
	Configuration string // the folder that is its /etc/ipipd
	Argv, Env     []string
}

// containerVariable is the environment variable with the container that this process is to become, as JSON.
const containerVariable = "IPIPD_TEST_CONTAINER"

// enterContainer makes this process a container if containerVariable is set: as runc does it, but without seccomp and a
// user of its own. The process is process 1 of new namespaces.
func enterContainer() {
	text := os.Getenv(containerVariable)
	if text == "" {
		return
	}
	runtime.LockOSThread()
	var c container
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		err = c.enter()
	}
	fmt.Fprintln(os.Stderr, "no container:", err)
	os.Exit(125)
}

func (c *container) enter() error {
	mount := func(source, target, kind string, flags uintptr, data string) error {
		target = c.Root + target
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			return fmt.Errorf("mount %s at %s: %w", source, target, err)
		}
		return nil
	}
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		mount(c.Root, "", "", unix.MS_BIND, ""),
		mount("proc", "/proc", "proc", safe, ""),
		mount("sysfs", "/sys", "sysfs", safe|unix.MS_RDONLY, ""),
		mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID, "mode=755"),
		mount(c.Configuration, "/etc/ipipd", "", unix.MS_BIND, ""),
		unix.Mount("", c.Root+"/etc/ipipd", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
		unix.Mount(c.Root+"/proc/sys", c.Root+"/proc/sys", "", unix.MS_BIND, ""),
		unix.Mount("", c.Root+"/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|safe, ""),
	)
	if c.Mode != 0 {
		err = errors.Join(err, mount("tmpfs", "/run", "tmpfs", safe, fmt.Sprintf("mode=%o", c.Mode)))
	}
	unix.Umask(0)
	device := func(name string, major, minor uint32) {
		err = errors.Join(err, unix.Mknod(c.Root+"/dev/"+name, unix.S_IFCHR|0o666, int(unix.Mkdev(major, minor))))
	}
	device("null", 1, 3)
	device("urandom", 1, 9)
	if c.TUN {
		err = errors.Join(err, os.Mkdir(c.Root+"/dev/net", 0o755))
		device("net/tun", 10, 200)
	}
	unix.Umask(0o022)
	if c.ReadOnly {
		err = errors.Join(err, unix.Mount("", c.Root, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	}
	err = errors.Join(err, unix.Chdir(c.Root), unix.PivotRoot(".", "."), unix.Unmount(".", unix.MNT_DETACH), unix.Chdir("/"))
	if err != nil {
		return err
	}
	for number := range uintptr(unix.CAP_LAST_CAP + 1) {
		if !slices.Contains(c.Capabilities, capabilityNames[number]) {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, number, 0, 0, 0); err != nil && err != unix.EINVAL {
				return fmt.Errorf("drop capability %d: %w", number, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	for _, variable := range c.Env {
		if folders, ok := strings.CutPrefix(variable, "PATH="); ok {
			return unix.Exec(path.Join(folders, c.Argv[0]), c.Argv, c.Env)
		}
	}
	return errors.New("the image has no PATH")
}

// capabilityNames has the names of the capabilities that a container may have.
var capabilityNames = map[uintptr]string{
	unix.CAP_NET_ADMIN: "NET_ADMIN", unix.CAP_NET_RAW: "NET_RAW", unix.CAP_NET_BIND_SERVICE: "NET_BIND_SERVICE", unix.CAP_BPF: "BPF",
}

// unpack unpacks the image for this architecture, and returns its entry point, arguments and environment.
func unpack(t *testing.T, archive, dir string) (entrypoint, args, env []string) {
	t.Helper()
	blobs := map[string][]byte{}
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if blobs["sha256:"+path.Base(h.Name)], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	read := func(digest string, to any) {
		t.Helper()
		if err := json.Unmarshal(blobs[digest], to); err != nil {
			t.Fatalf("%s: %v", digest, err)
		}
	}
	type index struct {
		Manifests []struct {
			Digest   string
			Platform struct{ OS, Architecture string }
		}
	}
	var outer, inner index
	read("sha256:index.json", &outer)
	if len(outer.Manifests) != 1 {
		t.Fatalf("the archive has %d images, want 1", len(outer.Manifests))
	}
	read(outer.Manifests[0].Digest, &inner)
	var manifest struct {
		Config struct{ Digest string }
		Layers []struct{ Digest string }
	}
	var platforms []string
	for _, m := range inner.Manifests {
		platforms = append(platforms, m.Platform.OS+"/"+m.Platform.Architecture)
		if m.Platform.Architecture == runtime.GOARCH {
			read(m.Digest, &manifest)
		}
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(platforms, want) || len(manifest.Layers) != 1 {
		t.Fatalf("the image is for %q, want %q, and has %d layers, want 1", platforms, want, len(manifest.Layers))
	}
	var config struct {
		Config struct{ Entrypoint, Cmd, Env []string }
	}
	read(manifest.Config.Digest, &config)
	z, err := gzip.NewReader(bytes.NewReader(blobs[manifest.Layers[0].Digest]))
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(to, os.FileMode(h.Mode))
		} else if content, readErr := io.ReadAll(r); readErr == nil {
			err = os.WriteFile(to, content, os.FileMode(h.Mode))
		} else {
			err = readErr
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return config.Config.Entrypoint, config.Config.Cmd, config.Config.Env
}

// image returns the image archive of v1.0.0.
func image(t *testing.T) string { return filepath.Join(first(t), "ipipd-1.0.0-image.tar") }

// start starts a container in a namespace.
func (c *container) start(t *testing.T, ns *netlab.NS, log io.Writer) *exec.Cmd {
	t.Helper()
	c.Root = t.TempDir()
	entrypoint, args, env := unpack(t, image(t), c.Root)
	if c.Args != nil {
		args = c.Args
	}
	c.Argv, c.Env = append(entrypoint, args...), env
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{containerVariable + "=" + string(text)}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	ns.Start(cmd)
	return cmd
}

// composed returns the container of packaging/container/compose.yaml.
func composed(t *testing.T) container {
	var file struct {
		Services map[string]struct {
			Command     []string
			NetworkMode string   `yaml:"network_mode"`
			Devices     []string `yaml:"devices"`
			CapDrop     []string `yaml:"cap_drop"`
			CapAdd      []string `yaml:"cap_add"`
			ReadOnly    bool     `yaml:"read_only"`
			Tmpfs       []string
			Volumes     []string
		}
	}
	readYAML(t, "compose.yaml", &file)
	s, ok := file.Services["ipipd"]
	if !ok || s.NetworkMode != "host" || !slices.Equal(s.CapDrop, []string{"ALL"}) || !slices.Equal(s.Devices, []string{"/dev/net/tun"}) ||
		!slices.Equal(s.Tmpfs, []string{"/run"}) || !slices.Equal(s.Volumes, []string{"./etc:/etc/ipipd:ro"}) {
		t.Fatalf("compose.yaml has %+v: the test starts something else", s)
	}
	return container{Args: s.Command, Capabilities: s.CapAdd, ReadOnly: s.ReadOnly, Mode: 0o1777, TUN: true}
}

// deployed returns the container of packaging/container/kubernetes.yaml on the node node1, and its ConfigMap.
func deployed(t *testing.T) (c container, configuration map[string]string) {
	type probe struct {
		HTTPGet struct {
			Host, Path string
			Port       int
		} `yaml:"httpGet"`
	}
	type document struct {
		Kind string
		Data map[string]string
		Spec struct {
			Template struct {
				Spec struct {
					HostNetwork bool `yaml:"hostNetwork"`
					Containers  []struct {
						Args            []string
						SecurityContext struct {
							ReadOnly     bool                         `yaml:"readOnlyRootFilesystem"`
							Capabilities struct{ Drop, Add []string } `yaml:"capabilities"`
						} `yaml:"securityContext"`
						StartupProbe   probe `yaml:"startupProbe"`
						ReadinessProbe probe `yaml:"readinessProbe"`
						LivenessProbe  probe `yaml:"livenessProbe"`
						VolumeMounts   []struct {
							Path string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
					}
				}
			}
		}
	}
	var documents []document
	text, err := os.ReadFile("../../packaging/container/kubernetes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for part := range strings.SplitSeq(string(text), "\n---\n") {
		var d document
		if err := yaml.Unmarshal([]byte(part), &d); err != nil {
			t.Fatal(err)
		}
		documents = append(documents, d)
	}
	if len(documents) != 2 || documents[0].Kind != "ConfigMap" || documents[1].Kind != "DaemonSet" {
		t.Fatalf("kubernetes.yaml has %d documents, want a ConfigMap and a DaemonSet", len(documents))
	}
	spec := documents[1].Spec.Template.Spec
	if !spec.HostNetwork || len(spec.Containers) != 1 {
		t.Fatalf("the DaemonSet has %+v: the test starts something else", spec)
	}
	k := spec.Containers[0]
	var mounts []string
	for _, m := range k.VolumeMounts {
		mounts = append(mounts, m.Path)
	}
	if !slices.Equal(mounts, []string{"/etc/ipipd", "/run", "/dev/net/tun"}) || !slices.Equal(k.SecurityContext.Capabilities.Drop, []string{"ALL"}) {
		t.Fatalf("the DaemonSet mounts %q and drops %q: the test starts something else", mounts, k.SecurityContext.Capabilities.Drop)
	}
	c = container{Capabilities: k.SecurityContext.Capabilities.Add, ReadOnly: k.SecurityContext.ReadOnly, Mode: 0o777, TUN: true}
	for _, a := range k.Args {
		c.Args = append(c.Args, strings.ReplaceAll(a, "$(NODE_NAME)", "node1"))
	}
	for _, p := range []probe{k.StartupProbe, k.ReadinessProbe, k.LivenessProbe} {
		c.Probes = append(c.Probes, fmt.Sprintf("http://%s:%d%s", p.HTTPGet.Host, p.HTTPGet.Port, p.HTTPGet.Path))
	}
	return c, documents[0].Data
}

func readYAML(t *testing.T, name string, to any) {
	t.Helper()
	text, err := os.ReadFile("../../packaging/container/" + name)
	if err == nil {
		err = yaml.Unmarshal(text, to)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// commands returns the containers of the lines of docs/docker.md that begin with docker run or podman run.
func commands(t *testing.T) map[string]container {
	t.Helper()
	text, err := os.ReadFile("../../docs/docker.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]container{}
	joined := strings.ReplaceAll(string(text), "\\\n", " ")
	for _, m := range regexp.MustCompile(`(?m)^((?:docker|podman) run .*)$`).FindAllStringSubmatch(joined, -1) {
		words := strings.Fields(m[1])
		c := container{}
		for i := 2; i < len(words); i++ {
			value := func() string { i++; return words[i] }
			switch w := words[i]; w {
			case "-d", "--rm":
			case "--name", "--network", "--restart", "--security-opt", "-v", "--stop-timeout", "--cap-drop":
				value()
			case "--read-only":
				c.ReadOnly = true
			case "--tmpfs":
				if v := value(); v != "/run" {
					t.Errorf("%s: --tmpfs %s is nothing that the test knows", m[1], v)
				}
				c.Mode = 0o1777
			case "--device":
				c.TUN = value() == "/dev/net/tun"
			case "--cap-add":
				c.Capabilities = append(c.Capabilities, value())
			default:
				if !strings.HasPrefix(w, "ipipd:") {
					t.Fatalf("%s: %s is nothing that the test knows", m[1], w)
				}
				c.Args, i = words[i+1:], len(words)
				if len(c.Args) == 0 {
					c.Args = nil
				}
			}
		}
		found[m[1]] = c
	}
	if len(found) < 2 {
		t.Errorf("docs/docker.md has %d lines that run a container, want docker's and podman's", len(found))
	}
	return found
}

// The image carries packets, started as in each example: those of the documents, compose and Kubernetes.
func TestContainer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces")
	}
	needs(t, "make", "nsenter")
	const plain = "tunnels: [{name: ipip1, remote-address: 198.51.100.1, address: 10.255.0.1/30}]\n"
	kubernetes, configMap := deployed(t)
	without := composed(t)
	without.Capabilities = slices.DeleteFunc(without.Capabilities, func(c string) bool { return c == "BPF" })
	tests := map[string]container{"compose": composed(t), "compose without BPF": without, "kubernetes": kubernetes}
	for line, c := range commands(t) {
		tests[line[:10]] = c
	}
	for name, c := range tests {
		t.Run(name, func(t *testing.T) {
			near, far := netlab.New(t), netlab.New(t)
			netlab.Veth(t, near, far, netlab.End{Name: "eth0", Address: "198.51.100.2/24"}, netlab.End{Name: "eth0", Address: "198.51.100.1/24"})
			netlab.Up(t, far, "far", "--remote-address", "198.51.100.2", "--address", "10.255.0.2/30", "--allow-fast-path", "no")
			c.Configuration = t.TempDir()
			update := func(files map[string]string) {
				t.Helper()
				if err := writeConfigMap(c.Configuration, files); err != nil {
					t.Fatal(err)
				}
			}
			if name == "kubernetes" {
				update(configMap)
			} else if err := os.WriteFile(c.Configuration+"/ipipd.yaml", []byte(plain), 0o644); err != nil {
				t.Fatal(err)
			}
			log := &netlab.Buffer{}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the container says:\n%s", log)
				}
			})
			cmd := c.start(t, near, log)
			pid := strconv.Itoa(cmd.Process.Pid)
			inside := func(args ...string) (string, error) { // as docker exec
				return near.Try("nsenter", append([]string{"-t", pid, "-m", "-p", "--", "/usr/bin/ipipd"}, args...)...)
			}
			netlab.Eventually(t, "a ping is answered", func() bool {
				_, err := near.Try("ping", "-c", "1", "-W", "1", "10.255.0.2")
				return err == nil
			})
			for _, url := range c.Probes {
				if status := get(near, url); status != http.StatusOK {
					t.Errorf("%s has status %d, want 200", url, status)
				}
			}
			status, _ := os.ReadFile("/proc/" + pid + "/status")
			if want := fmt.Sprintf("CapBnd:\t%016x\n", mask(c.Capabilities)); !strings.Contains(string(status), want) {
				t.Errorf("process 1 has other capabilities than %q:\n%s", c.Capabilities, status)
			}
			var tunnels []netlab.Status
			fastPath := slices.Contains(c.Capabilities, "BPF")
			netlab.Eventually(t, "the fast path is as BPF has it", func() bool {
				out, err := inside("print", "--json")
				return err == nil && json.Unmarshal([]byte(out), &tunnels) == nil && len(tunnels) == 1 && (tunnels[0].FastPath == "active") == fastPath
			})
			if name == "kubernetes" {
				configMap["node1.yaml"] += "\n    comment: reloaded\n"
				update(configMap)
				if out, err := inside("reload"); err != nil {
					t.Errorf("reload of another ConfigMap: %v\n%s", err, out)
				}
				if out, err := inside("print", "ipip1"); err != nil || !strings.Contains(out, "reloaded") {
					t.Errorf("after the reload: %v\n%s", err, out)
				}
			}
			_ = cmd.Process.Signal(unix.SIGTERM)
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("after SIGTERM: %v", err)
				}
			case <-time.After(netlab.Timeout()):
				t.Fatal("it does not end by SIGTERM")
			}
			if out, err := near.Try("ip", "link", "show", "ipip1"); err == nil {
				t.Errorf("it leaves %s", out)
			}
		})
	}
}

// writeConfigMap writes files as a kubelet does for a ConfigMap: the names are links through ..data, which is replaced.
func writeConfigMap(dir string, files map[string]string) error {
	version, err := os.MkdirTemp(dir, "..version")
	if err != nil {
		return err
	}
	_ = os.Chmod(version, 0o755)
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(version, name), []byte(text), 0o644); err != nil {
			return err
		}
		if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if err := os.Symlink(filepath.Base(version), dir+"/..data_tmp"); err != nil {
		return err
	}
	return os.Rename(dir+"/..data_tmp", dir+"/..data")
}

// get returns the HTTP status of a URL, requested from a namespace; 0 without an answer.
func get(ns *netlab.NS, url string) int {
	client := http.Client{Timeout: netlab.Timeout(), Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (c net.Conn, err error) {
		ns.Do(func() { c, err = net.Dial(network, address) })
		return c, err
	}}}
	r, err := client.Get(url)
	if err != nil {
		return 0
	}
	_ = r.Body.Close()
	return r.StatusCode
}

// mask returns the bits of capabilities.
func mask(names []string) (bits uint64) {
	for number, name := range capabilityNames {
		if slices.Contains(names, name) {
			bits |= 1 << number
		}
	}
	return bits
}
