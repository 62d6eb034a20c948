"""A verifiable reward of the toy's reviews: is the number of judgements the one asked for?"""
import re

JUDGEMENT = re.compile(r"the \w+ was (?:slightly|fairly|very|utterly) \w+")


def reward(texts, metadata):
    """Return 1 for a complete review with the row's number of `judgements` (3 without), else 0."""
    wanted = [row.get("judgements", 3) for row in metadata]
    found = [len(JUDGEMENT.findall(text)) for text in texts]
    ended = [text.endswith(".") for text in texts]
    return [float(f == w and e) for f, w, e in zip(found, wanted, ended, strict=True)]
