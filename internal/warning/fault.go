package warning

import "fmt"

// Fault is what keeps a tunnel from starting, found by the package that meets it: `up` fails with it, or logs it,
// and doctor finds it before. So both say the same.
type Fault struct {
	// Code is the code of doctor's finding.
	Code string
	// What is the case, Why it matters, and what to Do: a command wherever there is one, others behind ", or ".
	// They are clauses without a full stop.
	What, Why, Do string
	// Err is the error of a system call; nil if What says all.
	Err error
}

// Error returns What, what to Do, and Err, on one line.
func (f *Fault) Error() string {
	if f.Err == nil {
		return f.What + ": " + f.Do
	}
	return fmt.Sprintf("%s: %s: %v", f.What, f.Do, f.Err)
}

func (f *Fault) Unwrap() error { return f.Err }
