"""SummEdits: a consistent and an inconsistent summary of the same document.

    data.preferences.reader = "examples/readers/summedits.py:pairs"

The rows of one document, which may stand anywhere in the file, are joined: its inconsistent
summaries take its consistent ones in turn. Left out: the consistent summaries of a document that
has no inconsistent one, and the other way round (counted).

Source: https://github.com/salesforce/factualNLG (data/summedits)
"""

from amenable.data.schemas import Drop


def pairs(records):
    """Yields a preference row for each inconsistent summary."""
    documents = {}
    for row in records:
        documents.setdefault(row["doc"], ([], []))[row["label"]].append(row)
    for text, (wrong, right) in documents.items():
        if not (wrong and right):
            yield Drop("a document without both kinds of summaries")
            continue
        for number, row in enumerate(wrong):
            yield {
                "id": row["id"],
                "input_text": text,
                "candidate_0": right[number % len(right)]["summary"],
                "candidate_1": row["summary"],
                "choice": 0,
                "edit_types": row["edit_types"],
            }
