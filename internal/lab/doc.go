// Package lab makes hosts out of network namespaces, and joins them by cables: `ipipd demo` and the
// tests build their laboratories of it. It needs Linux and CAP_SYS_ADMIN.
//
// Its namespaces and interfaces have no name outside the process: they are gone when their files are
// closed or the process ends, however it ends.
package lab
