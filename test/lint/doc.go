// Package lint keeps the rules of this module's tree: what stands at its top, which
// package may import which, which files do no input or output, how long a file may be,
// and that the documents name what the code has. There is nothing in it but tests.
package lint
