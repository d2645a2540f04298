"""A C++ compiler without its optimiser, which compiles the same text once. Run as a program.

Arguments: the compiler, the folder of what was compiled, what the compiler is asked.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LEFT_OUT = re.compile(r"-O[13]|-flto.*|-fno-fat-lto-objects")
# Options that say where things lie: the preprocessed text says what they are.
PLACES = re.compile(r"-I.*|-MD")
PLACES_OF_TWO = ("-o", "-MF", "-MT", "-isystem", "-I")


def key_of(compiler: str, words: list[str]) -> str:
    """What decides about an object file, "" where the preprocessor fails. Writes dependencies."""
    at = words.index("-o")
    asked = [word for word in (*words[:at], *words[at + 2 :]) if word != "-c"]
    done = subprocess.run([compiler, *asked, "-E", "-P"], capture_output=True)
    if done.returncode:
        return ""
    source = next(word for word in asked if re.search(r"\.(cpp|cc|cxx|ii)$", word))
    flags, skip = [compiler], False
    for word in asked:
        if not (skip or word in PLACES_OF_TWO or PLACES.fullmatch(word) or word == source):
            flags.append(word)
        skip = word in PLACES_OF_TWO
    return hashlib.sha256("\0".join(flags).encode() + done.stdout).hexdigest()


def main() -> int:
    """Compiles, or takes what an earlier call compiled."""
    compiler, objects, *asked = sys.argv[1:]
    words = [word for word in asked if not LEFT_OUT.fullmatch(word)]
    sources = [word for word in words if re.search(r"\.(cpp|cc|cxx|ii)$", word)]
    if "-c" not in words or "-o" not in words or len(sources) != 1:
        os.execvp(compiler, [compiler, *words])
    key = key_of(compiler, words)
    out, kept = Path(words[words.index("-o") + 1]), Path(objects) / key
    if key and kept.exists():
        shutil.copyfile(kept, out)
        return 0
    status = subprocess.call([compiler, *words])
    if key and not status:
        kept.parent.mkdir(exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")  # never half of a file under the other name
        shutil.copyfile(out, new)
        new.rename(kept)
    return status


if __name__ == "__main__":
    sys.exit(main())
