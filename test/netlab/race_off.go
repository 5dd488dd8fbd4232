//go:build !race

package netlab

// raceDetector: this test has the race detector, and so has the daemon it builds.
const raceDetector = false
