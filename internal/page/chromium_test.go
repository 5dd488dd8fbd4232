package page

import (
	"bytes"
	"context"
	"fmt"
	"image/png"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/tunnel"
	"ipipd/test/netlab"
)

// browser runs Chromium without a window, has it print or draw url, and fails if the page has an error or
// breaks its own policy.
func browser(t *testing.T, url string, args ...string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("the pages are tried in a browser without -short")
	}
	program := ""
	for _, name := range []string{"chromium", "google-chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			program = found
			break
		}
	}
	if program == "" {
		t.Skip("chromium (package chromium) is missing: the pages are not tried in a browser")
	}
	home := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 2*netlab.Timeout())
	defer cancel()
	args = append([]string{
		"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--user-data-dir=" + filepath.Join(home, "profile"),
	}, append(args, url)...)
	c := exec.CommandContext(ctx, program, args...)
	c.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home, "LANG=C.UTF-8", "TZ=UTC")
	c.WaitDelay = time.Second // its children may hold the pipes open
	var out, log bytes.Buffer
	c.Stdout, c.Stderr = &out, &log
	if err := c.Run(); err != nil {
		t.Fatalf("%v\n%s", err, log.Bytes())
	}
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "CONSOLE") && !strings.Contains(line, "sandboxed") {
			t.Errorf("the page says %s", line)
		}
	}
	return out.String()
}

// dump returns the document after so many milliseconds of virtual time, which runs as fast as it can, or, for 0,
// once it is loaded.
func dump(t *testing.T, url string, milliseconds int) string {
	t.Helper()
	args := []string{"--dump-dom"}
	if milliseconds > 0 {
		args = append(args, fmt.Sprint("--virtual-time-budget=", milliseconds))
	}
	return browser(t, url, args...)
}

// names returns the tunnels of the rows that are not hidden, in order.
func names(dom string) string {
	var all []string
	for _, row := range regexp.MustCompile(`<tr data-name="([^"]*)"[^>]*?(hidden="")?>`).FindAllStringSubmatch(dom, -1) {
		if row[2] == "" {
			all = append(all, row[1])
		}
	}
	return strings.Join(all, " ")
}

// some returns a Page of a few tunnels with ten minutes of history.
func some(t testing.TB) *Page {
	t.Helper()
	tunnels := []tunnel.Sample{aTunnel("ipip1"), aTunnel("ipip2"), aTunnel("office-berlin"), aTunnel("vrrp"), {Name: "ipip4", Interface: "ipip4", RemoteAddress: "office.example", Comment: "later", Disabled: true}}
	tunnels[1].Running, tunnels[1].Encrypted, tunnels[1].Established, tunnels[1].FastPath = false, false, false, false
	tunnels[1].KeepaliveState = "lost"
	tunnels[2].Comment = "the office in Berlin, by the provider's second line; call +49 30 5550 first"
	tunnels[3].Running, tunnels[3].WaitingFor = false, "local-address 192.0.2.1, which is not on this host"
	tunnels[3].Comment = ""
	p, of := newPage(tunnels...)
	of.samples.Drops[drop.UnknownPeer] = 17
	p.read(start)
	now := start
	for i := range uint64(150) {
		now = now.Add(Interval)
		wave := 40_000_000 + 30_000_000*(i%30)/29
		add(&of.samples.Tunnels[0], wave, 9_000_000+i*100_000, 0)
		add(&of.samples.Tunnels[1], 0, 3_000, 12*(i%2)) // nobody answers
		add(&of.samples.Tunnels[2], 200_000*(i%7), wave/50, i%40/37*5)
		for j := range of.samples.Tunnels {
			if s := &of.samples.Tunnels[j]; s.Started && j != 1 {
				s.LastHeard = now.Add(-700 * time.Millisecond)
			}
		}
		p.read(now)
	}
	p.now = func() time.Time { return now }
	return p
}

func serve(t *testing.T, h http.Handler) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func TestPage_chromium(t *testing.T) {
	p := some(t)
	url := serve(t, p)
	without := dump(t, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		made := httptest.NewRecorder()
		p.ServeHTTP(made, r)
		maps.Copy(w.Header(), made.Header())
		w.Header().Add("Content-Security-Policy", "sandbox allow-same-origin") // forbids scripts
		w.Write(made.Body.Bytes())
	}))+"/", 0)
	if got := names(without); got != "ipip1 ipip2 ipip4 office-berlin vrrp" || strings.Contains(without, "<button") || !strings.Contains(without, `http-equiv="refresh"`) {
		t.Errorf("without scripts %s:\n%s", got, without)
	}
	if got := names(dump(t, url+"/", 1000)); got != "ipip1 ipip2 ipip4 office-berlin vrrp" {
		t.Errorf("with scripts %s", got)
	}
	with := dump(t, url+"/#sort=-state&filter=OFFICE", 1000)
	if got := names(with); got != "ipip1 office-berlin ipip4 ipip2" || !strings.Contains(with, "<button") || !strings.Contains(with, `aria-sort="descending"`) {
		t.Errorf("sorted by state, and filtered: %s", got)
	}
	one := dump(t, url+"/office-berlin", 1000)
	for _, want := range []string{"the office in Berlin", "bit/s", "<path ", drop.TooBig.Remedy()} {
		if !strings.Contains(one, want) {
			t.Errorf("the page of one has no %q", want)
		}
	}
}

// The page updates itself: rows change, come and go in place, and it says that a tunnel or the process has ended.
func TestPage_chromiumUpdate(t *testing.T) {
	first, second, third := aTunnel("ipip1"), aTunnel("ipip2"), aTunnel("ipip3")
	changed := second
	changed.Comment = "changed since"
	before, _ := newPage(second, third)
	after, _ := newPage(first, changed)
	// then has before answer the first request, and next all others.
	then := func(next http.Handler) string {
		var asked atomic.Bool
		return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !asked.Swap(true) {
				before.ServeHTTP(w, r)
				return
			}
			next.ServeHTTP(w, r)
		}))
	}
	quiet := regexp.MustCompile(`id="problem"[^>]* hidden=""`)
	if dom := dump(t, then(after)+"/", 12000); names(dom) != "ipip1 ipip2" || !strings.Contains(dom, "changed since") || !quiet.MatchString(dom) {
		t.Errorf("after an update: %s\n%s", names(dom), dom)
	}
	ended := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	if dom := dump(t, then(ended)+"/", 12000); names(dom) != "ipip2 ipip3" || !strings.Contains(dom, "ipipd does not answer") || quiet.MatchString(dom) {
		t.Errorf("after the end of the process: %s\n%s", names(dom), dom)
	}
	if dom := dump(t, then(after)+"/tunnel/ipip3", 12000); !strings.Contains(dom, "There is no tunnel ipip3") || strings.Contains(dom, "<svg") {
		t.Errorf("after the end of a tunnel:\n%s", dom)
	}
}

// What operators wrote, and what the URL has, stays text in a browser: neither an element nor a script comes of it.
func TestPage_chromiumHostile(t *testing.T) {
	var tunnels []tunnel.Sample
	for i, text := range hostile {
		s := aTunnel(fmt.Sprintf("%c%s", 'a'+i, text))
		s.Comment, s.WaitingFor, s.RemoteAddress = text, text, text
		tunnels = append(tunnels, s)
	}
	p, of := newPage(tunnels...)
	p.read(start)
	carry(p, of, start, 3, 1000, 1000, 1)
	url := serve(t, p)
	dom := dump(t, url+`/?"><script>alert(1)</script>#sort="><script>alert(1)</script>&filter=%3Cscript%3E`, 7500)
	if n := strings.Count(dom, "<script"); n != 1 {
		t.Errorf("%d scripts", n)
	}
	for _, not := range []string{"<img", "<form", "onerror=\"", "onmouseover=\""} {
		if strings.Contains(dom, not) {
			t.Errorf("there is %s", not)
		}
	}
	if got := strings.Count(names(dom), "script"); got == 0 || names(dom) == "" {
		t.Errorf("the filter shows %q", names(dom))
	}
}

// The page has the background of the colour scheme that the browser prefers. With PAGE_SCREENSHOTS the pictures stay
// in that folder, for people to look at.
func TestPage_chromiumScreenshot(t *testing.T) {
	url := serve(t, some(t))
	dir := os.Getenv("PAGE_SCREENSHOTS")
	if dir == "" {
		dir = t.TempDir()
	}
	for _, c := range []struct {
		name, path, size string
		dark             bool
	}{
		{"all-light", "/", "1400,700", false}, {"all-dark", "/", "1400,700", true}, {"all-phone", "/", "500,1400", false},
		{"one-dark", "/tunnel/office-berlin", "1200,900", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			file, scheme := filepath.Join(dir, c.name+".png"), 1
			if c.dark {
				scheme = 0
			}
			browser(t, url+c.path, "--window-size="+c.size, "--screenshot="+file, fmt.Sprint("--blink-settings=preferredColorScheme=", scheme), "--virtual-time-budget=1000")
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			picture, err := png.Decode(f)
			if err != nil {
				t.Fatal(err)
			}
			r, g, b, _ := picture.At(1, 1).RGBA()
			if got, want := fmt.Sprintf("%02x%02x%02x", r>>8, g>>8, b>>8), map[bool]string{false: "ffffff", true: "14171a"}[c.dark]; got != want {
				t.Errorf("its background is %s, want %s", got, want)
			}
			colours := map[any]bool{}
			for y := range picture.Bounds().Dy() {
				for x := range picture.Bounds().Dx() {
					colours[picture.At(x, y)] = true
				}
			}
			if len(colours) < 20 {
				t.Errorf("%d colours", len(colours))
			}
		})
	}
}

func BenchmarkPage_makeIndex(b *testing.B) {
	benchmark(b, func(p *Page) []byte { _, page := p.makeIndex(p.now()); return page })
}
func BenchmarkPage_makeTunnel(b *testing.B) {
	benchmark(b, func(p *Page) []byte { _, page := p.makeTunnel(p.now(), "ipip7"); return page })
}

// benchmark makes a page of 1,000 tunnels that were busy for ten minutes.
func benchmark(b *testing.B, of func(*Page) []byte) {
	p := busy(1000)
	var page []byte
	b.ReportAllocs()
	for b.Loop() {
		p.index = nil
		page = of(p)
	}
	b.ReportMetric(float64(len(page)), "bytes/page")
}
