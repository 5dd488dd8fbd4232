// Package lab makes hosts out of network namespaces, and joins them by cables: `ipipd demo` and the
// tests build their laboratories of it. It needs Linux and CAP_SYS_ADMIN.
//
// What it makes has no name outside the process: it is gone when its files are closed or the process
// ends, however that ends.
package lab
