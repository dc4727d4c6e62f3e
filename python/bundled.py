"""Paths of the shared libraries that the extension needs and that have no static version here, one a line."""

import glob
import os
import re
import subprocess
import sys

LIBRARIES = ("cjson", "pcre2-8", "png16", "z")


def find(compiler, name):
    path = subprocess.run([*compiler, "-print-file-name=" + name], capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


for library in LIBRARIES:
    shared = find(sys.argv[1:], f"lib{library}.so")
    if shared and not find(sys.argv[1:], f"lib{library}.a"):
        versions = [p for p in glob.glob(shared + ".*") if re.fullmatch(r".*\.so\.\d+", p)]
        print(*versions, sep="\n")
