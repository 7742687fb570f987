"""SciTLDR: the abstract of a paper, and the first of its one-sentence summaries.

    data.demonstrations.reader = "examples/readers/scitldr.py:demonstrations"

Left out: labels and scores of the sentences. Further summaries of a paper stay in the row under
`other_references`, which changes no training.

Source: https://github.com/allenai/scitldr (SciTLDR-Data/SciTLDR-A)
"""


def demonstrations(records):
    """Yields a demonstration row for each paper."""
    for row in records:
        first, *others = row["target"]
        yield {
            "id": row["paper_id"],
            "input_text": " ".join(sentence.strip() for sentence in row["source"]),
            "output_text": first.strip(),
            "title": row["title"],
            **({"other_references": others} if others else {}),
        }
