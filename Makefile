# `make help` lists the targets. Every variable below can be given on the
# command line: make test PKG=./encap RUN=ECN

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PREFIX    ?= /usr/local
PKG       ?= ./...
RUN       ?= .
FUZZTIME  ?= 10s
BENCH     ?= .
BENCHARGS ?= -count=6 -benchtime=200ms
PEERSARGS ?=
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
PLATFORMS := linux/amd64 linux/arm64 darwin/arm64

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
GOTESTSUM   := gotest.tools/gotestsum@v1.13.0

# What fails is run once more, unless more than four fail, or there is a data race or
# a panic; scripts/closing judges both runs. go test's own ten minutes for a package
# are too few on a machine with other work.
GOTEST = bin/tools/$(notdir $(GOTESTSUM)) --rerun-fails=1 --rerun-fails-max-failures=4 --rerun-fails-abort-on-data-race \
	--format pkgname-and-test-fails --format-icons text --format-hide-empty-pkg \
	--jsonfile bin/$@.json --post-run-command 'go run ./scripts/closing'

# The version goes in through the linker, so that Go need not ask git: git refuses
# to answer about a tree that someone else owns, and the build would fail with it.
export CGO_ENABLED := 0
GOBUILD := go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'

.DEFAULT_GOAL := build
.PHONY: help build bpf docs demo test test-race interop fuzz bench bench-peers lint vuln cross install clean FORCE

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

build: ipipd ## build ./ipipd, one static binary

ipipd: FORCE
	$(GOBUILD) -o $@ ./cmd/ipipd

bpf: ## compile the fast path's eBPF programs again (clang, llvm); what they are compiled to is in the tree
	internal/fastpath/bpf/build "$(CURDIR)/internal/fastpath/bpf/ipip.o" | tee internal/fastpath/bpf/compiler

docs: ## write docs/flags.md again from the program's own tables
	UPDATE_DOCS=1 go test -count=1 -run '_docs$$' ./cmd/ipipd

demo: ipipd ## two hosts in network namespaces, a tunnel between them, a packet on the wire (needs root)
	./ipipd demo

test: bin/tools/$(notdir $(GOTESTSUM)) ## every test; installs what the tests need (root, apt), says what it skipped and why
	@scripts/need test
	$(GOTEST) --packages '$(PKG)' -- -count=1 -timeout 60m -run '$(RUN)'

test-race: bin/tools/$(notdir $(GOTESTSUM)) ## the tests, but for those with guests, under the race detector, which needs cgo and gcc
	@scripts/need test race
	@if ! command -v gcc >/dev/null; then echo 'skipped: the race detector needs gcc'; exit 0; fi; \
	CGO_ENABLED=1 $(GOTEST) --packages '$(PKG)' -- -race -short -count=1 -timeout 60m -run '$(RUN)'

interop: bin/tools/$(notdir $(GOTESTSUM)) ## only the tests against what was not written here: socat, the kernel's ipip, strongSwan, tshark, scapy
	@scripts/need test
	$(GOTEST) --packages './test/interop ./internal/ipsec/...' -- -count=1 -timeout 60m -run '$(patsubst .,Interop,$(RUN))'

fuzz: ## each fuzz target for FUZZTIME (10s)
	@scripts/fuzz '$(FUZZTIME)' $(PKG)

bench: bin/tools/$(notdir $(BENCHSTAT)) ## go test -bench, against the last commit (or BASE=REVISION) by benchstat
	@scripts/bench $< '$(BENCH)' '$(BENCHARGS)' $(PKG)

bench-peers: ipipd ## ipipd beside socat, fastd, OpenVPN, wireguard-go, VXLAN and the bare link (root, ~20 min)
	@scripts/need peers
	go run ./test/bench -ipipd ./ipipd $(PEERSARGS)

lint: bin/tools/$(notdir $(STATICCHECK)) ## gofmt, go vet and staticcheck, for each system it is built for
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "gofmt -w is wanted on:"; echo "$$unformatted"; exit 1; fi
	@status=0; for p in $(PLATFORMS); do \
		echo "go vet and staticcheck for $$p"; \
		GOOS=$${p%/*} GOARCH=$${p#*/} go vet ./... || status=1; \
		GOOS=$${p%/*} GOARCH=$${p#*/} $< ./... || status=1; \
	done; exit $$status

vuln: bin/tools/$(notdir $(GOVULNCHECK)) ## known vulnerabilities that this code can reach (asks the Go vulnerability database, or GOVULNDB)
	@scripts/vuln $<

cross: ## build for linux/amd64, linux/arm64 and darwin/arm64 into bin/
	@for p in $(PLATFORMS); do \
		echo "bin/ipipd-$${p/\//-}"; \
		GOOS=$${p%/*} GOARCH=$${p#*/} $(GOBUILD) -o bin/ipipd-$${p/\//-} ./cmd/ipipd; \
	done

install: ipipd ## copy ./ipipd to PREFIX/bin (/usr/local/bin)
	install -D -m 0755 ipipd $(DESTDIR)$(PREFIX)/bin/ipipd

clean: ## remove what the other targets built
	rm -rf ipipd bin

# A tool is built once for this machine and kept under its version. GOOS, GOARCH and
# GOFLAGS are cleared: they are about this project, not about the tool.
bin/tools/$(notdir $(STATICCHECK)): TOOL = $(STATICCHECK)
bin/tools/$(notdir $(GOVULNCHECK)): TOOL = $(GOVULNCHECK)
bin/tools/$(notdir $(BENCHSTAT)): TOOL = $(BENCHSTAT)
bin/tools/$(notdir $(GOTESTSUM)): TOOL = $(GOTESTSUM)
bin/tools/%:
	@mkdir -p $(@D)
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	GOOS= GOARCH= GOFLAGS= GOBIN=$$dir go install $(TOOL); \
	mv $$dir/* $@
