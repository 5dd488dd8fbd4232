package lint

import (
	"go/ast"
	"path"
	"regexp"
	"strings"
	"testing"
)

// fileSuffix is what a test file's name has after its topic.
var fileSuffix = regexp.MustCompile(`(_linux)?_test\.go$`)

// A test is named after what it tests: TestDecapsulate, TestPathMTU_TooBig, then after
// another underscore, or as the name of a subtest, the case (TestDecapsulate_trailingBytes,
// TestDecapsulate/trailing-bytes). So the tests of a function are found by its name. What
// is tested is an identifier of the package; in test/conformance, test/interop, test/examples, test/soak and test/packaging,
// which test the program, it is what the file is about.
func TestNames(t *testing.T) {
	declared := map[string]map[string]bool{} // of each folder, the identifiers and methods, in lower case
	type test struct{ file, subject, name string }
	var tests []test
	eachGoFile(t, func(name string, parsed *ast.File, _ int) {
		dir := path.Dir(name)
		if declared[dir] == nil {
			declared[dir] = map[string]bool{}
		}
		if !strings.HasSuffix(name, "_test.go") {
			declare(declared[dir], parsed)
			return
		}
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv != nil || f.Name.Name == "TestMain" {
				continue
			}
			for _, kind := range []string{"Test", "Benchmark", "Fuzz"} {
				if rest, ok := strings.CutPrefix(f.Name.Name, kind); ok {
					subject, _, _ := strings.Cut(rest, "_")
					tests = append(tests, test{name, subject, f.Name.Name})
				}
			}
		}
	})
	for _, test := range tests {
		switch dir := path.Dir(test.file); dir {
		case "test/lint":
		case "test/conformance", "test/interop", "test/examples", "test/soak", "test/packaging":
			topic := fileSuffix.ReplaceAllString(path.Base(test.file), "")
			if !strings.EqualFold(test.subject, topic) {
				t.Errorf("%s: %s does not begin with what the file is about, %q", test.file, test.name, topic)
			}
		default:
			if !declared[dir][strings.ToLower(test.subject)] {
				t.Errorf("%s: %s does not begin with what it tests: %s has no %q", test.file, test.name, dir, test.subject)
			}
		}
	}
}

// declare adds what a file declares at its top: identifiers, and methods with their
// type's name in front.
func declare(names map[string]bool, f *ast.File) {
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			names[strings.ToLower(receiver(d)+d.Name.Name)] = true
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					names[strings.ToLower(spec.Name.Name)] = true
				case *ast.ValueSpec:
					for _, n := range spec.Names {
						names[strings.ToLower(n.Name)] = true
					}
				}
			}
		}
	}
}

// receiver returns the name of a method's receiver type; "" for a function.
func receiver(f *ast.FuncDecl) string {
	if f.Recv == nil {
		return ""
	}
	e := f.Recv.List[0].Type
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	if index, ok := e.(*ast.IndexExpr); ok {
		e = index.X
	}
	if id, ok := e.(*ast.Ident); ok {
		return id.Name
	}
	return ""
}
