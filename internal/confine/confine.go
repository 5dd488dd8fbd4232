// Package confine gives up what a process with a tunnel has no use for, so that
// whoever gets the better of it by a packet gets no more than a tunnel's means.
//
// It is for every thread of the process, for those to come, and for good. Whoever
// needs more later has to have it open before.
package confine
