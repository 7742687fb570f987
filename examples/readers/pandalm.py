"""PandaLM's test set: what most of three annotators preferred.

    data.preferences.reader = "examples/readers/pandalm.py:pairs"

Left out, and counted: pairs with a response that is empty or no text (the file has the value
`true` in places), equal responses, and pairs without a majority for one of the two.

Source: https://github.com/WeOpenML/PandaLM (data/testset-v1.json)
"""

from amenable.data.schemas import Drop


def pairs(records):
    """Yields a preference row for each pair with a majority."""
    for row in records:
        texts = [row["response1"], row["response2"]]
        votes = [row[f"annotator{number}"] for number in (1, 2, 3)]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            yield Drop("a response is empty or no text")
        elif texts[0] == texts[1]:
            yield Drop("the responses are equal")
        elif max(votes.count(1), votes.count(2)) < 2:
            yield Drop("no majority for either response")
        else:
            yield {
                "id": f"pandalm-{row['idx']}",
                "input_text": f"{row['instruction']}\n\n{row['input']}".strip(),
                "candidate_0": texts[0],
                "candidate_1": texts[1],
                "choice": int(votes.count(2) > votes.count(1)),
            }
