package handover

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// passEnv is the variable with the descriptor of the list of what a Keeper has passed.
const passEnv = "IPIPD_KEEP"

// Pass makes what is kept stay open over execve(2), for ResumeKeeper in the new program, which has to have variable
// in its environment. undo takes that back after an execve that has failed. There must be no child.
func (k *Keeper) Pass() (variable string, undo func(), err error) {
	fd, err := unix.MemfdCreate("ipipd-keep", 0)
	if err != nil {
		return "", nil, os.NewSyscallError("memfd_create", err)
	}
	list := os.NewFile(uintptr(fd), "ipipd-keep")
	undo = func() {
		list.Close()
		for _, d := range k.kept {
			_ = setCloseOnExec(d.fd, true)
		}
	}
	var text bytes.Buffer
	for _, d := range k.kept {
		fmt.Fprintln(&text, d.fd, d.name)
		if err := setCloseOnExec(d.fd, false); err != nil {
			undo()
			return "", nil, err
		}
	}
	if _, err := list.Write(text.Bytes()); err != nil {
		undo()
		return "", nil, err
	}
	return passEnv + "=" + strconv.Itoa(fd), undo, nil
}

// ResumeKeeper is NewKeeper in a program that may have been executed after Pass: it takes over what was passed.
// resumed reports whether anything was. It takes the variable out of the environment. After an error the Keeper can
// be used, without what it could not take.
func ResumeKeeper(limit int) (k *Keeper, resumed bool, err error) {
	k = NewKeeper(limit)
	variable, resumed := os.LookupEnv(passEnv)
	if !resumed {
		return k, false, nil
	}
	_ = os.Unsetenv(passEnv)
	fd, err := strconv.Atoi(variable)
	if err != nil || fd < firstFD || setCloseOnExec(fd, true) != nil {
		return k, true, fmt.Errorf("%s=%.20q: want the descriptor of a list", passEnv, variable)
	}
	list := os.NewFile(uintptr(fd), "ipipd-keep")
	defer list.Close()
	lines := bufio.NewScanner(io.NewSectionReader(list, 0, 1<<30))
	for lines.Scan() {
		number, name, _ := strings.Cut(lines.Text(), " ")
		if err := k.resume(number, name); err != nil {
			return k, true, fmt.Errorf("the list of what was kept: %.300q: %w", lines.Text(), err)
		}
	}
	return k, true, lines.Err()
}

// resume takes over one descriptor.
func (k *Keeper) resume(number, name string) error {
	fd, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	if err := checkName(name); err != nil {
		return err
	}
	if fd < firstFD {
		return fmt.Errorf("descriptor %d is one of the process", fd)
	}
	if err := setCloseOnExec(fd, true); err != nil {
		return err
	}
	_, err = k.keep(name, fd)
	return err
}

func setCloseOnExec(fd int, on bool) error {
	flags := 0
	if on {
		flags = unix.FD_CLOEXEC
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags)
	return os.NewSyscallError("fcntl F_SETFD", err)
}
