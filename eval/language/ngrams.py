"""An n-gram model over tokens with Witten-Bell smoothing: the trivial baseline of a language model."""

import numpy as np


class NGrams:
    """
    Counts of n-grams of tokens.

    Args:
        stream: tokens, integers [n] below 2**15.
        vocabulary: the size of the vocabulary.
        order: the longest n-grams; 1 for unigrams.
    """

    def __init__(self, stream: np.ndarray, vocabulary: int, order: int = 3):
        stream = np.asarray(stream, dtype=np.int64)
        self.order, self.vocabulary = order, vocabulary
        self.unigrams = np.bincount(stream, minlength=vocabulary)
        # by order: sorted keys of n-grams, their counts; of their histories, total counts and kinds of followers
        self.tables = {}
        for size in range(2, order + 1):
            keys, counts = np.unique(self.keys(stream, size), return_counts=True)
            histories, first = np.unique(keys >> 15, return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(keys)))
            self.tables[size] = (keys, counts, histories, totals, kinds, first)

    @staticmethod
    def keys(stream: np.ndarray, size: int) -> np.ndarray:
        """One integer for each n-gram of `size` tokens, int64 [n - size + 1]."""
        key = np.zeros(len(stream) - size + 1, dtype=np.int64)
        for place in range(size):
            key = (key << 15) | stream[place : len(stream) - size + 1 + place]
        return key

    @staticmethod
    def look_up(sorted_keys: np.ndarray, wanted: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
        """Each of `values` at the wanted keys, 0 for keys that are missing."""
        place = np.searchsorted(sorted_keys, wanted).clip(max=len(sorted_keys) - 1)
        found = sorted_keys[place] == wanted
        return [np.where(found, value[place], 0) for value in values]

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """The probability of each token after those before it, float64 [n]; the first has no history."""
        tokens = np.asarray(tokens, dtype=np.int64)
        result = (self.unigrams[tokens] + 1) / (self.unigrams.sum() + self.vocabulary)
        for size in range(2, self.order + 1):
            if len(tokens) < size:
                break
            keys, counts, histories, totals, kinds, _ = self.tables[size]
            wanted = self.keys(tokens, size)
            (count,) = self.look_up(keys, wanted, counts)
            total, kind = self.look_up(histories, wanted >> 15, totals, kinds)
            lower = result[size - 1 :]
            result[size - 1 :] = np.where(total > 0, (count + kind * lower) / np.maximum(total + kind, 1), lower)
        return result

    def continue_text(self, tokens: list[int], length: int, rng: np.random.Generator) -> list[int]:
        """Sample `length` tokens, each after the longest known history."""
        text = list(tokens)
        for _ in range(length):
            text.append(self.draw(text, rng))
        return text[len(tokens) :]

    def draw(self, text: list[int], rng: np.random.Generator) -> int:
        """Sample one token after a text."""
        for size in range(self.order, 1, -1):
            if len(text) < size - 1:
                continue
            keys, counts, histories, _, kinds, first = self.tables[size]
            history = 0
            for token in text[len(text) - size + 1 :]:
                history = (history << 15) | token
            place = int(np.searchsorted(histories, history))
            if place < len(histories) and histories[place] == history:
                span = slice(first[place], first[place] + kinds[place])
                chosen = rng.choice(keys[span], p=counts[span] / counts[span].sum())
                return int(chosen) & 0x7FFF
        return int(rng.choice(self.vocabulary, p=self.unigrams / self.unigrams.sum()))
