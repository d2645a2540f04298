"""Evaluates the golden vectors by the native module alone; run in a Python without torch.

Arguments: the module's file, the golden vectors. Prints what was found as JSON.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from array import array
from typing import Any

REFLECT = {"none": 0, "vector": 1, "element": 2}


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


def evaluate(native: Any, entry: dict[str, Any]) -> bool:
    """True when an entry of the golden vectors comes out as it is written down."""
    config = entry["config"]
    law = native.LayerLaw(**{**config, "reflect": REFLECT[config["reflect"]]})
    if "points" in entry:
        n, b = (array("q", column) for column in zip(*entry["points"], strict=True))
    else:
        rows, blocks = config["rows"], config["blocks"]
        n = array("q", (row for row in range(rows) for _ in range(blocks)))
        b = array("q", range(blocks)) * rows
    per_block = 1 if config["reflect"] == "vector" else -(-config["granularity"] // 32)
    slots = array("q", bytes(8 * len(n)))
    words = array("q", bytes(8 * len(n) * per_block))
    law.slots(address(n), address(b), len(n), address(slots), 1)
    law.sign_words(address(n), address(b), len(n), address(words), 1)
    if "points" in entry:
        wanted = [word for row in entry.get("sign words", ()) for word in row]
        return slots.tolist() == entry["slots"] and (not wanted or words.tolist() == wanted)
    found = {"slots sha256": sha256("i", slots), "sign words sha256": sha256("I", words)}
    return all(entry[name] == digest for name, digest in found.items())


def sha256(code: str, numbers: array[int]) -> str:
    # The vectors hold the digests of 32-bit numbers.
    return hashlib.sha256(array(code, numbers).tobytes()).hexdigest()


def cuda_error(native: Any) -> str:
    """What the CUDA entry point says; the addresses are never looked at."""
    law = native.LayerLaw(0, 0, 6, 10, 8, 20, 3, 1, True)
    try:
        native.cuda.law(law, 0, 0, 0, 1, 0, 0, 0)
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    native = load(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as file:
        entries = json.load(file)["entries"]
    results = {name: evaluate(native, entry) for name, entry in entries.items()}
    found = {
        "build": native.build_info(),
        "right": [name for name, right in results.items() if right],
        "wrong": [name for name, right in results.items() if not right],
        "cuda": cuda_error(native),
        "parts": [name for name in ("cuda", "simt") if hasattr(native, name)],
        "torch": importlib.util.find_spec("torch") is not None,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
