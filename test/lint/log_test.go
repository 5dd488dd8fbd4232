package lint

import (
	"go/ast"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// askLog are the tests that look for words in the log, or in what `up` writes to standard error instead.
var askLog = map[string]string{
	"TestControlRaise":                  "the log itself",
	"TestControlWarnIPsec_shortSecret":  "a secret that is not there",
	"TestIPsec_noCleartext":             "a secret that is not there",
	"TestIPsec_negotiationFailed":       "a secret that is not there",
	"TestIPsec_port500Taken":            "the error of a failed start",
	"TestIPsec_secretFileMode":          "the error of a failed start",
	"TestLifecycle_nameTaken":           "the error of a failed start",
	"TestEngineApply_fastPathTakenOver": "a moment without the fast path",
	"TestPeerConfig_networkd":           "the log of systemd-networkd",
	"awaitLinkLayer":                    "how a process receives, which only the debug log says",
}

// A test of a tunnel asks print for the state, and does not search the log for words, which are for people
// and may change. It may count lines of the log, and those with an attribute level or warning.
func TestLog(t *testing.T) {
	attribute := regexp.MustCompile(`^(\n|(level|warning)=.*)$`)
	asked := map[string]bool{}
	eachGoFile(t, func(name string, parsed *ast.File, _ int) {
		if !strings.HasSuffix(name, "_test.go") || !slices.Contains([]string{"internal/tunnel", "test/conformance", "test/interop"}, path.Dir(name)) {
			return
		}
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || len(call.Args) != 2 || !named(call.Fun, "strings") || !ofLog(call.Args[0]) {
					return true
				}
				text := call.Args[1]
				for sum, ok := text.(*ast.BinaryExpr); ok; sum, ok = text.(*ast.BinaryExpr) {
					text = sum.X
				}
				words := "what a variable says"
				if literal, ok := text.(*ast.BasicLit); ok {
					words, _ = strconv.Unquote(literal.Value)
				}
				if asked[f.Name.Name] = true; askLog[f.Name.Name] == "" && !attribute.MatchString(words) {
					t.Errorf("%s: %s asks the log for %q: ask print --json, whose warnings have codes", name, f.Name.Name, words)
				}
				return true
			})
		}
	})
	for name := range askLog {
		if !asked[name] {
			t.Errorf("%s need not be among askLog: it does not ask the log", name)
		}
	}
}

// named reports whether e is an identifier of a package: packageName.X.
func named(e ast.Expr, packageName string) bool {
	selector, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := selector.X.(*ast.Ident)
	return ok && x.Name == packageName
}

// ofLog reports whether e has an identifier log or Log in it.
func ofLog(e ast.Expr) (found bool) {
	ast.Inspect(e, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok && strings.EqualFold(id.Name, "log") {
			found = true
		}
		return true
	})
	return found
}
