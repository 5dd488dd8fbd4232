//go:build race

package netlab

// raceDetector: tests, and the ipipd that they build, run under the race detector.
const raceDetector = true
