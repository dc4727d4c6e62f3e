#!/usr/bin/env bash
# Python package
exec "$(dirname "$0")/../python/run.sh" "${1:-build-check}-python"
