# Two commands matter: `make up` starts a local cluster, `make test` runs every test.
# Everything that is fetched or made lies in .cresset and target, both ignored by git.

FETCH := python3 deploy/bootstrap/fetch.py
CARGO_FLAGS := --release --workspace --locked

FIRST_SEED ?= 0
SEEDS ?= 10000
SEED ?=

.PHONY: help fetch build models up demo bench bench-quorum bench-scale test conformance-triton perf-analyzer fuzz simulate simulate-mutants wiring chaos fmt lint doc deny clean-data
.DEFAULT_GOAL := help

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

fetch: ## fetch libtorch, the demo models and the speech, once
	@$(FETCH) libtorch models speech

build: ## build all binaries into target/release
	@$(FETCH) libtorch
	cargo build $(CARGO_FLAGS)

models: build ## put the demo models into the model repository
	@$(FETCH) models
	@target/release/cresset-prepare

# `exec`, so that Ctrl-C and SIGTERM reach the cluster itself and not a shell in front of it.
up: fetch models ## start a local cluster with the demo models; Ctrl-C stops it
	@exec target/release/cresset up --model-repository .cresset/models --data-dir .cresset/cluster \
	  --deploy silero_vad --deploy minilm --deploy digits $(UP_FLAGS)

demo: fetch models ## stream speech through a cluster while its processes are killed
	@exec target/release/cresset-demo $(DEMO_FLAGS)

bench: models ## measure overhead, throughput, tail, overload and memory beside libtorch in process; some minutes
	@exec target/release/cresset-bench $(BENCH_FLAGS)

bench-quorum: build ## measure how fast coordinators agree and elect, beside etcd where it is installed; some minutes
	@exec target/release/cresset-bench-quorum $(BENCH_FLAGS)

bench-scale: build ## measure what up to 1,000 workers with 10,000 models cost the coordinators; some minutes
	@exec target/release/cresset-bench-scale $(BENCH_FLAGS)

test: fetch models ## run every test
	@$(FETCH) venv
	python3 deploy/bootstrap/test_fetch.py
	cargo test $(CARGO_FLAGS) $(TEST_FLAGS)

conformance-triton: ## ask a real Triton (fetched, 55 MB) again for the answers that Cresset's are compared with
	@$(FETCH) venv triton
	@.cresset/venv/bin/python tests/conformance/differential.py record --triton .cresset/triton
	@git --no-pager diff --stat -- tests/conformance/oracle/recorded.json

perf-analyzer: fetch ## Triton's own load tool against a local cluster; needs root and debootstrap where glibc is older than 2.38
	@$(FETCH) load
	@cargo build $(CARGO_FLAGS)
	CRESSET_PERF_ANALYZER=1 cargo test $(CARGO_FLAGS) --package cresset-tests --test main load_tool -- --nocapture

fuzz: fetch ## an hour of rubbish against requests and configurations; FUZZ_SECONDS sets the time
	CRESSET_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),3600) cargo test $(CARGO_FLAGS) --package cresset-tests --test fuzz -- --nocapture

simulate: build ## the control plane in virtual time; SEEDS and FIRST_SEED choose what it meets
	@exec target/release/cresset-simulate --seeds $(SEEDS) --first-seed $(FIRST_SEED)

simulate-mutants: build ## plant bugs and count the seeds until the simulation finds each
	@exec target/release/cresset-simulate --mutants --first-seed $(FIRST_SEED)

wiring: fetch ## the coordinators over their real gRPC wiring in virtual time; SEEDS and FIRST_SEED choose what it meets
	CRESSET_WIRING_SEEDS=$(SEEDS) CRESSET_WIRING_FIRST_SEED=$(FIRST_SEED) cargo test $(CARGO_FLAGS) --test main wiring::coordinators -- --nocapture

# `SECONDS` is a variable of some shells, so only what is said here or on the command line counts.
SECONDS = 600
chaos: fetch models ## hurt a cluster of real processes under load and check every response; SECONDS and SEED choose how
	@$(FETCH) venv
	@exec target/release/cresset-chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(CHAOS_FLAGS)

fmt: ## format the sources
	cargo fmt --all

lint: ## check the format, and clippy with warnings as errors
	@$(FETCH) libtorch
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

doc: ## build the documentation, with warnings as errors
	@$(FETCH) libtorch
	RUSTDOCFLAGS=-Dwarnings cargo doc $(CARGO_FLAGS) --no-deps

deny: ## check licences, sources and duplicate or banned crates
	@$(FETCH) deny
	cargo fetch --locked
	.cresset/bin/cargo-deny --offline --locked check --hide-inclusion-graph bans licenses sources

clean-data: ## forget the local cluster's data; what was fetched and built stays
	rm -rf .cresset/cluster
