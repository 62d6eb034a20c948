"""A reward: how friendly a response sounds, from -1 to 1 (needs: pip install vaderSentiment).

    torchrun ppo.py --reward-model docs/vader.py:friendliness ...

See docs/real_model.md.
"""
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

judge = SentimentIntensityAnalyzer()


def friendliness(responses):
    """Score each response; the prompt does not count."""
    return [judge.polarity_scores(response)["compound"] for response in responses]
