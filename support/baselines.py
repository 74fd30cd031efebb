"""What a network must beat: classifiers that count words or letters, from scikit-learn."""

from collections.abc import Sequence
from itertools import product

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline

from support.metrics import accuracy, auroc


def opponents() -> dict[str, list[Pipeline]]:
    """Return the variants of each classifier, not yet fitted: text in, probability out."""
    words = {"token_pattern": r"(?u)\b\w+\b|[£!]"}
    letters = {"analyzer": "char_wb", "ngram_range": (1, 5), "lowercase": False}

    def tf_idf(C, **options):
        vectorizer = TfidfVectorizer(sublinear_tf=True, **options)
        return make_pipeline(vectorizer, LogisticRegression(C=C, max_iter=2_000))

    return {
        "naive Bayes": [
            make_pipeline(CountVectorizer(ngram_range=(1, n), **words), MultinomialNB(alpha=alpha))
            for n, alpha in product((1, 2), (0.1, 0.3, 1.0))
        ],
        "tf-idf, words": [
            tf_idf(C, ngram_range=(1, n), **words) for n, C in product((1, 2), (3, 30, 300, 3000))
        ],
        "tf-idf, letters": [tf_idf(C, **letters) for C in (3, 30, 300, 3000)],
    }


def choose(variants: list[Pipeline], texts, labels, val_texts: Sequence[str], val_labels):
    """Return the variant, fitted, that is best on the validation texts: accuracy, then AUROC."""

    def grade(model):
        probs = model.fit(texts, labels).predict_proba(val_texts)[:, 1]
        return accuracy(val_labels, probs > 0.5), auroc(val_labels, probs)

    return max(variants, key=grade)
