package tun

import "errors"

// ErrNameTaken is returned by Open when an interface of that name, of any kind, exists. Open
// never attaches to it or changes it.
var ErrNameTaken = errors.New("an interface of that name is already there: choose another name, or remove it")

// errNotSplittable is returned for a superpacket that is not well-formed TCP or UDP in IPv4.
var errNotSplittable = errors.New("superpacket cannot be split: not well-formed TCP or UDP in IPv4")
