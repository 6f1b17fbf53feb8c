"""Images that a dataset holds twice: the same pixels, or nearly the same picture.

Every image is known by `FINGERPRINT`, 25 bytes. Equal pixels have equal digests. A picture that was encoded anew,
brightened or resized keeps two perceptual hashes of 64 bits within a few bits; on aligned faces most pairs that close
are two people, so candidates are read again and compared by `appearance`.

The thresholds were measured on 18,000 images of CelebA at 64x64: 134 of 162 million pairs are candidates. Their
correlations are 0.961 and more for 16 pairs, all seen to be the same photograph, and 0.941 and less for the others,
among which two are the same photograph. Over 99% of copies made anew as JPEG of quality 20, at 1.2 times the
brightness, or at half the size and back are candidates.
"""

import hashlib
import importlib.util
import itertools

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt64
from PIL import Image

FINGERPRINT = np.dtype([("digest", "u8"), ("phash", "u8"), ("dhash", "u8"), ("kind", "u1")])
DAMAGED, DECODED, COMPARABLE = 0, 1, 2  # kinds: not an image, one without perceptual hashes, one with them
PHASH_DISTANCE = 6  # bits of 64 in which two candidates differ at most
DHASH_DISTANCE = 8
MIN_CORRELATION = 0.95  # of the appearances of near duplicates
APPEARANCE_SIDE = 32  # pixels
MIN_GREY_RANGE = 8  # of 255; flatter images have no picture to compare: their hashes are noise
HASH_BYTES = 8
# Limits for datasets of which a large part looks the same; 100,000 frames of one film would make 5 billion pairs.
MAX_NEIGHBOURS = 4096  # in a bucket, that one image is compared with
MAX_FOUND = 128  # candidates of one image, each counted once for every two bytes that agree

Pairs = Int64[np.ndarray, "pairs 2"]  # indices of images, the smaller first


def can_compare() -> bool:
    """Whether imagehash is installed, without which only equal pixels are found."""
    return importlib.util.find_spec("imagehash") is not None


def fingerprint(pixels: UInt8[np.ndarray, "r r 3"], *, perceptual: bool) -> tuple[int, int, int, int]:
    """The fields of `FINGERPRINT` for an image, the perceptual hashes only where they are asked for."""
    digest = int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")
    if not perceptual:
        return digest, 0, 0, DECODED
    import imagehash

    grey = Image.fromarray(pixels).convert("L")
    values = np.asarray(grey)
    if int(values.max()) - int(values.min()) < MIN_GREY_RANGE:
        return digest, 0, 0, DECODED
    return digest, _bits(imagehash.phash(grey).hash), _bits(imagehash.dhash(grey).hash), COMPARABLE


def _bits(values: Bool[np.ndarray, "8 8"]) -> int:
    return int.from_bytes(np.packbits(values).tobytes(), "little")


def appearance(pixels: UInt8[np.ndarray, "r r 3"]) -> Float32[np.ndarray, " 1024"]:
    """A small grey picture less its mean, of norm 1: the product of two is their correlation."""
    grey = Image.fromarray(pixels).convert("L").resize((APPEARANCE_SIDE, APPEARANCE_SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, np.float32).reshape(-1)
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def exact_pairs(fingerprints: np.ndarray, splits: UInt8[np.ndarray, " n"]) -> Pairs:
    """Every image that has the pixels of an earlier one, with the first such image in each split up to its own.

    So the pairs are fewer than images times splits, however many copies there are. The 64 bits of the digests agree by
    chance in one of 37 million datasets of a million images.

    Args:
      fingerprints: of every image, of the type `FINGERPRINT`.
      splits: number of the split of every image, ascending.
    """
    whole = np.flatnonzero(fingerprints["kind"] != DAMAGED)
    return whole[_repeated(fingerprints["digest"][whole], splits[whole])]


def near_candidates(fingerprints: np.ndarray, splits: UInt8[np.ndarray, " n"]) -> tuple[Pairs, int]:
    """Pairs of different pixels whose perceptual hashes are close, and how many images were not compared with all.

    Of images with the same pixels in a split the first stands for all; images of the same perceptual hash are compared
    with the first of each split only. Arguments as of `exact_pairs`.
    """
    items = np.flatnonzero(fingerprints["kind"] == COMPARABLE)
    items = items[_firsts(fingerprints["digest"][items], splits[items])]
    hashes = fingerprints["phash"][items]
    same_hash = _repeated(hashes, splits[items])
    chosen = _firsts(hashes, splits[items])
    close, left_out = _close_pairs(hashes[chosen], fingerprints["dhash"][items[chosen]])
    pairs = items[np.concatenate([same_hash, chosen[close]])]
    digest, dhash = fingerprints["digest"], fingerprints["dhash"]
    first, second = pairs.T
    kept = (digest[first] != digest[second]) & (np.bitwise_count(dhash[first] ^ dhash[second]) <= DHASH_DISTANCE)
    return np.unique(np.sort(pairs[kept], axis=1), axis=0), left_out


def _firsts(keys: UInt64[np.ndarray, " n"], splits: UInt8[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """Where each key first occurs in each split."""
    places = [np.flatnonzero(splits == split) for split in np.unique(splits)]
    return np.sort(
        np.concatenate([np.empty(0, np.int64), *(p[np.unique(keys[p], return_index=True)[1]] for p in places)])
    )


def _repeated(keys: UInt64[np.ndarray, " n"], splits: UInt8[np.ndarray, " n"]) -> Pairs:
    """Each occurrence of a key with its first one in each split up to its own, leaving out an item with itself."""
    places = [np.flatnonzero(splits == split) for split in np.unique(splits)]
    found = [np.empty((0, 2), np.int64)]
    for earlier, later in itertools.combinations_with_replacement(places, 2):
        known, first = np.unique(keys[earlier], return_index=True)
        position = np.minimum(np.searchsorted(known, keys[later]), len(known) - 1)
        hit = known[position] == keys[later]
        pairs = np.stack([earlier[first[position[hit]]], later[hit]], axis=1)
        found.append(pairs[pairs[:, 0] != pairs[:, 1]])
    return np.concatenate(found)


def _close_pairs(phash: UInt64[np.ndarray, " n"], dhash: UInt64[np.ndarray, " n"]) -> tuple[Pairs, int]:
    """Pairs with 1 to `PHASH_DISTANCE` different bits and no more than `DHASH_DISTANCE`, and how many items were cut.

    Where at most 6 of 64 bits differ, at least two of the eight bytes are equal. So for each two bytes the items are
    sorted into buckets by them, and only those in one bucket are compared (Manku et al. 2007).
    """
    octets = phash.view(np.uint8).reshape(-1, HASH_BYTES)
    found, cut, counts = np.empty(0, np.int64), np.zeros(len(phash), bool), np.zeros(len(phash), np.uint8)
    for one, two in itertools.combinations(range(HASH_BYTES), HASH_BYTES - PHASH_DISTANCE):
        key = octets[:, one].astype(np.uint16) << 8 | octets[:, two]
        order = np.argsort(key, kind="stable")
        sorted_key, sorted_phash, sorted_dhash = key[order], phash[order], dhash[order]
        following = np.searchsorted(sorted_key, sorted_key, side="right") - np.arange(len(order)) - 1
        cut[order[following > MAX_NEIGHBOURS]] = True
        following = np.minimum(following, MAX_NEIGHBOURS)
        step, left = 1, np.flatnonzero((following > 0) & (counts[order] < MAX_FOUND))
        new = [found]
        while left.size:  # compares every item with the one `step` places after it
            distance = np.bitwise_count(sorted_phash[left] ^ sorted_phash[left + step])
            near = left[(distance <= PHASH_DISTANCE) & (distance > 0)]
            near = near[np.bitwise_count(sorted_dhash[near] ^ sorted_dhash[near + step]) <= DHASH_DISTANCE]
            if near.size:
                first, second = order[near], order[near + step]
                new.append(np.minimum(first, second) * len(order) + np.maximum(first, second))
                counts[first] += 1
            step += 1
            left = left[following[left] >= step]
            if near.size:
                left = left[counts[order[left]] < MAX_FOUND]
        found = np.unique(np.concatenate(new))
    return np.stack(np.divmod(found, max(len(phash), 1)), axis=1), int((cut | (counts >= MAX_FOUND)).sum())
