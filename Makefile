# `make help` lists the targets. All variables can be set on the command line:
# make test PKG=./encap RUN=ECN

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PREFIX    ?= /usr/local
PKG       ?= ./...
RUN       ?= .
FUZZTIME  ?= 10s
BENCH     ?= .
BENCHARGS ?= -count=6 -benchtime=200ms
PEERSARGS ?=
SCALEARGS ?= -tunnels 1,10,100,1000,4000
SOAK      ?= 10m
SEED      ?= 0
SOAKARGS  ?=
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT    ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
# The time of all files in packages, in seconds.
EPOCH     ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
PACKAGES  ?= deb/amd64 deb/arm64 rpm/amd64 rpm/arm64
PACKAGEDIR ?= bin/packages
PLATFORMS := linux/amd64 linux/arm64 darwin/arm64

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
GOTESTSUM   := gotest.tools/gotestsum@v1.13.0
# From v2.46.0 on nfpm needs go.digitalxero.dev/go-msix, which not every module proxy serves.
NFPM        := github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2

# Failed tests are rerun once, unless more than four fail, or one has a data race or
# panics; scripts/testsummary evaluates both runs. The timeout of a package is an hour:
# go test's default of 10 minutes is too short on a busy machine.
GOTEST = bin/tools/$(notdir $(GOTESTSUM)) --rerun-fails=1 --rerun-fails-max-failures=4 --rerun-fails-abort-on-data-race \
	--format pkgname-and-test-fails --format-icons text --format-hide-empty-pkg \
	--jsonfile bin/$@.json --post-run-command 'go run ./scripts/testsummary'

# The linker sets the version, so that Go does not run git (-buildvcs), which fails in a
# tree that another user owns.
export CGO_ENABLED := 0
GOBUILD := go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)'

.DEFAULT_GOAL := build
.PHONY: help build bpf docs demo test test-race test-arm64 interop fuzz bench bench-peers bench-scale bench-many soak lint vuln cross packages image install uninstall clean FORCE

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

build: ipipd ## build ./ipipd, one static binary

ipipd: FORCE
	$(GOBUILD) -o $@ ./cmd/ipipd

bpf: ## recompile the fast path's eBPF programs (clang, llvm); the object file is in the tree
	internal/fastpath/bpf/build "$(CURDIR)/internal/fastpath/bpf/ipip.o" | tee internal/fastpath/bpf/compiler

docs: ## regenerate docs/flags.md, docs/drops.md, docs/warnings.md and the table of docs/metrics.md
	UPDATE_DOCS=1 go test -count=1 -run '_docs$$' ./cmd/ipipd ./internal/metrics ./test/lint

demo: ipipd ## two hosts in network namespaces, a tunnel between them, a packet on the wire (needs root)
	./ipipd demo

test: bin/tools/$(notdir $(GOTESTSUM)) ## all tests; installs the programs they need (root, apt)
	@scripts/need test
	$(GOTEST) --packages '$(PKG)' -- -count=1 -timeout 60m -run '$(RUN)'

test-race: bin/tools/$(notdir $(GOTESTSUM)) ## the tests under the race detector (cgo, gcc), without those with guests
	@scripts/need test race
	@if ! command -v gcc >/dev/null; then echo 'skipped: the race detector needs gcc'; exit 0; fi; \
	CGO_ENABLED=1 $(GOTEST) --packages '$(PKG)' -- -race -short -count=1 -timeout 60m -run '$(RUN)'

# The packages whose tests need no network, without those that qemu-user cannot run (eBPF, seccomp, tests that start
# themselves again) or takes minutes for (IKE, the reference of the splitter).
ARM64 = ./encap ./mss ./keepalive ./tun ./internal/{capture,config,control,drop,fib,history,ipsec,ipsec/esp,ipv4,packet,vnet}
ARM64SKIP = QueueSelector|TestListen_killedProcess|TestSplitter_reference|TestQueue_superpacket|TestSuiteMaxInner

test-arm64: ## the tests that need no network, for linux/arm64 by qemu-user; installs it (root, apt)
	@scripts/need arm64
	@if ! command -v qemu-aarch64-static >/dev/null; then echo 'skipped: the tests of linux/arm64 need qemu-user-static'; exit 0; fi; \
	GOARCH=arm64 go test -count=1 -short -vet=off -exec '$(CURDIR)/scripts/arm64' -skip '$(ARM64SKIP)' $(ARM64)

interop: bin/tools/$(notdir $(GOTESTSUM)) ## only the tests against other implementations: socat, the kernel's ipip, strongSwan, tshark, scapy
	@scripts/need test
	@tests='$(RUN)'; if [ "$$tests" = . ]; then \
		tests=$$(go test -list . ./test/interop && go test -list '[Ii]nterop' ./internal/ipsec/...); \
		tests="^($$(grep ^Test <<<"$$tests" | sort -u | paste -sd '|'))$$"; \
	fi; \
	$(GOTEST) --packages './test/interop ./internal/ipsec/...' -- -count=1 -timeout 60m -run "$$tests"

fuzz: ## each fuzz target for FUZZTIME (10s)
	@scripts/fuzz '$(FUZZTIME)' $(PKG)

bench: bin/tools/$(notdir $(BENCHSTAT)) ## go test -bench, against the last commit (or BASE=REVISION) by benchstat
	@scripts/bench $< '$(BENCH)' '$(BENCHARGS)' $(PKG)

bench-peers: ipipd ## ipipd beside socat, fastd, OpenVPN, wireguard-go, VXLAN and the bare link (root, ~20 min)
	@scripts/need peers
	go run ./test/bench -ipipd ./ipipd $(PEERSARGS)

bench-scale: ## 1 to 4,000 tunnels in one process: start, close, memory, threads, idling (root)
	go run ./test/scale $(SCALEARGS)

bench-many: ipipd ## one interface with 1,000 remotes beside one with one remote: rate, goodput, memory (root)
	go run ./test/scale -many ./ipipd $(MANYARGS)

soak: ipipd ## two ends of ten tunnels while everything around them changes and fails, for SOAK (10m), by SEED (root)
	@scripts/need soak
	go test -tags soak -count=1 -timeout 0 -v -run '^TestSoak$$' ./test/soak -args -ipipd '$(CURDIR)/ipipd' -for '$(SOAK)' -seed '$(SEED)' $(SOAKARGS)

lint: bin/tools/$(notdir $(STATICCHECK)) ## gofmt, go vet and staticcheck, for each platform
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "run gofmt -w on:"; echo "$$unformatted"; exit 1; fi
	@status=0; for p in $(PLATFORMS); do \
		echo "go vet and staticcheck for $$p"; \
		GOOS=$${p%/*} GOARCH=$${p#*/} go vet -tags soak ./... || status=1; \
		GOOS=$${p%/*} GOARCH=$${p#*/} $< -checks all -tags soak ./... || status=1; \
	done; exit $$status
	@cd packaging/image && go vet . && ../../$< -checks all .

vuln: bin/tools/$(notdir $(GOVULNCHECK)) ## govulncheck: known vulnerabilities that this code can reach (Go vulnerability database, or GOVULNDB)
	@scripts/vuln $<

cross: ## build for linux/amd64, linux/arm64 and darwin/arm64 into bin/
	@for p in $(PLATFORMS); do \
		echo "bin/ipipd-$${p/\//-}"; \
		GOOS=$${p%/*} GOARCH=$${p#*/} $(GOBUILD) -o bin/ipipd-$${p/\//-} ./cmd/ipipd; \
	done

packages: bin/tools/$(notdir $(NFPM)) ## deb and rpm for amd64 and arm64, with SBOMs, into bin/packages
	packaging/build $< '$(PACKAGEDIR)' '$(VERSION)' '$(COMMIT)' '$(EPOCH)' $(PACKAGES)

image: ## container image for amd64 and arm64, an OCI archive without a base image, into bin/packages
	packaging/build '' '$(PACKAGEDIR)' '$(VERSION)' '$(COMMIT)' '$(EPOCH)' image

# What install copies and uninstall removes, below DESTDIR and PREFIX.
INSTALLED = bin/ipipd lib/systemd/system/ipipd.service lib/systemd/system/ipipd@.service lib/sysusers.d/ipipd.conf \
	share/bash-completion/completions/ipipd share/zsh/site-functions/_ipipd share/fish/vendor_completions.d/ipipd.fish \
	$(foreach page,$(notdir $(wildcard packaging/man/*)),share/man/man$(lastword $(subst ., ,$(page)))/$(page))

install: ipipd ## ipipd, unit files, man pages and completions into PREFIX (/usr/local), below DESTDIR
	@cd packaging && to='$(DESTDIR)$(PREFIX)' && set -x && \
	install -D -m 0755 ../ipipd "$$to/bin/ipipd" && \
	for unit in ipipd.service ipipd@.service; do sed 's|/usr/bin/|$(PREFIX)/bin/|' systemd/$$unit | install -D -m 0644 /dev/stdin "$$to/lib/systemd/system/$$unit"; done && \
	install -D -m 0644 systemd/ipipd.sysusers "$$to/lib/sysusers.d/ipipd.conf" && \
	for page in man/*; do install -D -m 0644 $$page "$$to/share/man/man$${page##*.}/$${page##*/}"; done && \
	../ipipd completion bash | install -D -m 0644 /dev/stdin "$$to/share/bash-completion/completions/ipipd" && \
	../ipipd completion zsh | install -D -m 0644 /dev/stdin "$$to/share/zsh/site-functions/_ipipd" && \
	../ipipd completion fish | install -D -m 0644 /dev/stdin "$$to/share/fish/vendor_completions.d/ipipd.fish"

uninstall: ## remove what install has copied
	rm -f $(addprefix '$(DESTDIR)$(PREFIX)'/,$(INSTALLED))

clean: ## remove all build results
	rm -rf ipipd bin

# A tool is built once per version, for the build host: GOOS, GOARCH and GOFLAGS, which are
# for ipipd, are cleared.
bin/tools/$(notdir $(STATICCHECK)): TOOL = $(STATICCHECK)
bin/tools/$(notdir $(GOVULNCHECK)): TOOL = $(GOVULNCHECK)
bin/tools/$(notdir $(BENCHSTAT)): TOOL = $(BENCHSTAT)
bin/tools/$(notdir $(GOTESTSUM)): TOOL = $(GOTESTSUM)
bin/tools/$(notdir $(NFPM)): TOOL = $(NFPM)
bin/tools/%:
	@mkdir -p $(@D)
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	GOOS= GOARCH= GOFLAGS= GOBIN=$$dir go install $(TOOL); \
	mv $$dir/* $@
