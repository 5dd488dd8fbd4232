package tun

import "errors"

// ErrNameTaken is the error of Open when an interface of that name is already
// there. It is left as it is, whatever it is.
var ErrNameTaken = errors.New("an interface of that name is already there: choose another name, or remove it")

// errNotSplittable is about a superpacket that is not sound TCP or UDP in IPv4.
var errNotSplittable = errors.New("superpacket cannot be split: no sound TCP or UDP in IPv4")
