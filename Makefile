# A thin front door over Meson and Ninja. `make help` lists the targets.
BUILD ?= build
PREFIX ?= /usr/local

.PHONY: help build demo check bench install sanitize fuzz format clean

help:
	@echo "make demo      a language model answers a question about a long document (MODEL=path DOC=path ASK=text)"
	@echo "make check     build everything and run all tests"
	@echo "make build     the library and the attn command, in $(BUILD)/"
	@echo "make bench     measure this machine and the kernels"
	@echo "make install   install to PREFIX ($(PREFIX))"
	@echo "make sanitize  all tests with the address, undefined-behaviour and thread sanitizers"
	@echo "make fuzz      run the fuzzers for SECONDS each (60)"
	@echo "make format    clang-format over the lines of C files that changed since the last commit"

$(BUILD)/build.ninja:
	@scripts/setup.sh build
	meson setup $(BUILD) --prefix $(abspath $(PREFIX)) -Dtests=disabled

build: $(BUILD)/build.ninja
	@ninja -C $(BUILD) --quiet

demo:
	@scripts/setup.sh demo
	@$(MAKE) --no-print-directory build
	@scripts/demo.sh $(BUILD)/cli/attn

check:
	@scripts/setup.sh check
	@scripts/check.sh

bench: build
	@scripts/bench.sh $(BUILD)

# The build directory may have been made for another prefix, by `make demo` for example. Programs find the library after ldconfig.
install: build
	@meson configure $(BUILD) -Dprefix=$(abspath $(PREFIX))
	meson install -C $(BUILD)
	@if [ -z "$(DESTDIR)" ] && [ "$$(id -u)" -eq 0 ]; then ldconfig; fi

sanitize:
	@scripts/setup.sh sanitize
	@scripts/sanitize.sh

fuzz:
	@scripts/setup.sh sanitize
	@fuzz/run.sh $(or $(SECONDS),60)

format:
	@scripts/setup.sh format
	@git clang-format --force --extensions c,h

clean:
	rm -rf $(BUILD) build-*
