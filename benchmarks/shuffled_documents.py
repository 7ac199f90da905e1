"""Documents of text files in one random order, as `hf-moe lab --data` reads them: {"text": ...} a line, compressed.

    python benchmarks/shuffled_documents.py FOLDER debian.jsonl.xz --characters 50000000

FOLDER holds .txt files, in which <|endoftext|> stands behind each document. The committed results of the lab are of 17
packages of Debian 12, a file each: linux-doc-6.1, python3.11-doc, perl-doc, git-doc, libreoffice-help-en-us,
postgresql-doc-15, dict-gcide, dict-wn, dict-foldoc, dict-jargon, bible-kjv-text, fortunes, r-cran-janeaustenr,
debian-policy, developers-reference, debian-reference-en, gnome-user-docs.
"""

import argparse
import json
import lzma
import random
from pathlib import Path

END = "<|endoftext|>"
SHORTEST = 200  # characters of a document that counts


def documents(folder: Path) -> list[str]:
    found = [text.strip() for path in sorted(folder.glob("*.txt")) for text in path.read_text("utf-8").split(END)]
    return [text for text in found if len(text) > SHORTEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=50_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts, left = documents(args.folder), args.characters
    random.Random(args.seed).shuffle(texts)
    with lzma.open(args.out, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text)
            if left < 0:
                return
    raise SystemExit(f"{args.folder} has {args.characters - left:,} characters, --characters asks for more.")


if __name__ == "__main__":
    main()
