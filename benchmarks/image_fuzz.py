"""Damaged images of every format through `load_image`: only `ImageError` comes out, at little memory.

Small images of each format are changed at random (bytes, lengths, truncation, pieces of another file; half of the PNG
files get valid checksums again), with a fixed seed. Each format has a process of its own, whose peak is measured.
Ends with 1 where another error came out, a process died, or the peak is above the limit.

python benchmarks/image_fuzz.py --files 20000
"""

import argparse
import json
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, features

SIZE = (61, 47)
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def whole_images(kind: str) -> list[bytes]:
    """Sound files of a format, of several modes and options."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    alpha, grey = rgb.copy(), rgb.convert("L")
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0128] = 6, 72.0, 2
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words " * 50, zip=True)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    more: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90, expand=False)]}
    cases: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "JPEG": [
            (rgb, {"exif": exif}),
            (rgb, {"progressive": True, "icc_profile": b"profile" * 30}),
            (grey, {}),
            (rgb.convert("CMYK"), {}),
        ],
        "MPO": [(rgb, {**more, "exif": exif})],
        "PNG": [
            (rgb, {"exif": exif, "pnginfo": text, "icc_profile": b"profile" * 30}),
            (alpha, {}),
            (deep, {"transparency": 257}),
            (rgb.quantize(32), {"transparency": 3}),
            (rgb, more),
            (grey.convert("1"), {}),
        ],
        "WEBP": [(rgb, {"exif": exif}), (alpha, {"lossless": True, "xmp": b"<x/>"}), (rgb, more)],
        "GIF": [(rgb.quantize(64), {"transparency": 1}), (rgb.quantize(16), more), (grey, {"interlace": True})],
        "BMP": [(rgb, {}), (grey, {}), (rgb.quantize(16), {}), (grey.convert("1"), {})],
        "TIFF": [
            (rgb, {"exif": exif}),
            (alpha, {"compression": "tiff_lzw"}),
            (deep, {"compression": "tiff_adobe_deflate"}),
            (floats, {}),
            (rgb, {"compression": "jpeg"}),
            (grey.convert("1"), {"compression": "group4"}),
            (rgb, {"big_tiff": True}),
        ],
        "AVIF": [(rgb, {"exif": exif}), (alpha, {}), (grey, {})],
        "PPM": [(rgb, {}), (grey, {}), (grey.convert("1"), {}), (floats, {}), (deep, {})],
    }
    files = []
    for image, options in cases[kind]:
        data = BytesIO()
        image.save(data, kind, **options)
        files.append(data.getvalue())
    if kind == "PPM":
        files.append(b"P3\n4 2\n255\n" + b"1 20 255 " * 8)
    return files


def changed(files: list[bytes], rng: random.Random, kind: str) -> bytes:
    """One of the files, with one to eight changes."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        # half of the changes hit the headers
        end = max(1, len(data))
        at = rng.randrange(min(end, 128)) if rng.random() < 0.5 else rng.randrange(end)
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b""
            case 2:
                number = rng.choice(EXTREMES)
                width = rng.choice("BHI")
                number &= (1 << 8 * struct.calcsize(width)) - 1
                data[at : at + struct.calcsize(width)] = struct.pack(rng.choice("<>") + width, number)
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 64))
            case 5:
                other = rng.choice(files)
                start = rng.randrange(len(other))
                data[at : at + 64] = other[start : start + rng.randrange(1, 256)]
            case 6:
                del data[rng.randrange(end) :]
    if kind == "PNG" and rng.random() < 0.5:
        return sound_checksums(bytes(data))
    return bytes(data)


def sound_checksums(data: bytes) -> bytes:
    """Return a PNG file with the checksum of each chunk recomputed."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        parts += [data[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join([*parts, data[at:]])


def measure(kind: str, count: int, seed: int) -> dict[str, Any]:
    """Read the changed files of one format."""
    from d2svse.images import ImageError, load_image

    warnings.simplefilter("ignore")
    rng, files = random.Random(f"{seed}:{kind}"), whole_images(kind)
    for data in files:
        load_image(data)
    found: dict[str, Any] = {"format": kind, "files": count, "read": 0, "refused": 0, "slowest": 0.0, "faults": []}
    start = time.perf_counter()
    for number in range(count):
        data, before = changed(files, rng, kind), time.perf_counter()
        try:
            image = load_image(data)
            found["read"] += 1
            if image.mode != "RGB":
                found["faults"].append(f"{number}: mode {image.mode}")
        except ImageError as error:
            found["refused"] += 1
            if len(str(error)) > 1000:
                found["faults"].append(f"{number}: a message of {len(str(error))} characters")
        except Exception as error:
            found["faults"].append(f"{number}: {type(error).__name__}: {error}")
        found["slowest"] = max(found["slowest"], time.perf_counter() - before)
    found["seconds"] = time.perf_counter() - start
    found["peak"] = peak_kilobytes() / 1e6
    return found


def peak_kilobytes() -> int:
    """The peak of this process's resident memory, without that of the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def results(kinds: list[str], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Measure each format in a process of its own."""
    for row, kind in enumerate(kinds):
        share = count // len(kinds) + (row < count % len(kinds))
        command = [sys.executable, __file__, "--kind", kind, "--files", str(share), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            faults = [f"the process ended with {done.returncode}: {done.stderr.strip()[-500:]}"]
            yield {"format": kind, "files": share, "faults": faults}
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a table, one row a format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1.0, help="Peak memory that is allowed, in GB.")
    parser.add_argument("--kind", choices=FORMATS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        print(json.dumps(measure(args.kind, args.files, args.seed)))
        return
    kinds = [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")]
    faults = 0
    print("| format | files | read | refused | peak memory, GB | seconds | slowest file, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in results(kinds, args.files, args.seed):
        if "peak" in row:
            print(
                "| {format} | {files} | {read} | {refused} | {peak:.2f} | {seconds:.0f} | {slowest:.2f} |".format(**row)
            )
            if row["peak"] > args.limit:
                row["faults"].append(f"a peak of {row['peak']:.2f} GB")
        for fault in row["faults"][:10]:
            print(f"{row['format']}: {fault}", file=sys.stderr)
        faults += len(row["faults"])
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
