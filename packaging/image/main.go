// Image writes an OCI archive of an image index: image OUT VERSION COMMIT EPOCH ARCH=ROOT... Each ROOT is the only layer
// of the image for that architecture. The same folders and arguments give the same bytes; EPOCH is the time of all files.
//
// It is a module of its own, so that its dependencies are not the program's.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	if len(os.Args) < 6 {
		fmt.Fprintln(os.Stderr, "usage: image OUT VERSION COMMIT EPOCH ARCH=ROOT...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5:]); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, version, commit, epoch string, roots []string) error {
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return err
	}
	made := time.Unix(seconds, 0).UTC()
	labels := map[string]string{
		"org.opencontainers.image.title":       "ipipd",
		"org.opencontainers.image.description": "IP-in-IP (RFC 2003) tunnels without a kernel module",
		"org.opencontainers.image.licenses":    "MIT",
		"org.opencontainers.image.version":     version,
		"org.opencontainers.image.revision":    commit,
		"org.opencontainers.image.created":     made.Format(time.RFC3339),
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, r := range roots {
		arch, root, ok := strings.Cut(r, "=")
		if !ok {
			return fmt.Errorf("%s: want ARCH=ROOT", r)
		}
		image, err := imageOf(root, arch, made, labels)
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	index = mutate.Annotations(index, labels).(v1.ImageIndex)

	dir, err := os.MkdirTemp("", "image")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	name := map[string]string{"org.opencontainers.image.ref.name": "ipipd:" + version} // the name after podman load
	if err := l.AppendIndex(index, layout.WithAnnotations(name)); err != nil {
		return err
	}
	archive, err := tarOf(dir, made)
	if err != nil {
		return err
	}
	err = os.WriteFile(out+".new", archive, 0o644)
	if err == nil {
		err = os.Rename(out+".new", out)
	}
	if err != nil {
		_ = os.Remove(out + ".new")
	}
	return err
}

// imageOf returns an image with one layer, root, which without arguments starts all tunnels of /etc/ipipd, under a keeper.
func imageOf(root, arch string, made time.Time, labels map[string]string) (v1.Image, error) {
	files, err := tarOf(root, made)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image, err := mutate.Append(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON),
		mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: made}, CreatedBy: "make image"}})
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Created = "linux", arch, v1.Time{Time: made}
	file.Config = v1.Config{
		Entrypoint: []string{"ipipd"},
		Cmd:        []string{"keep", "--", "ipipd", "up", "--config", "/etc/ipipd"},
		Env:        []string{"PATH=/usr/bin"},
		WorkingDir: "/",
		StopSignal: "SIGTERM",
		Labels:     labels,
	}
	return mutate.ConfigFile(image, file)
}

// tarOf returns a tar archive of the files of a folder, in order of name, owned by root.
func tarOf(dir string, made time.Time) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := &tar.Header{Format: tar.FormatUSTAR, Name: name, Mode: int64(info.Mode().Perm() | 0o444), ModTime: made}
		switch {
		case info.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
			return w.WriteHeader(h)
		case !info.Mode().IsRegular():
			return fmt.Errorf("%s: want files and folders", path)
		}
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	err = errors.Join(err, w.Close())
	return b.Bytes(), err
}
