"""Captions that a small model was trained on: reading the list, and prompts in its plain form."""
import re


def read_captions(text):
    """captions.txt -> list of captions.

    A line has an object and its synonyms, separated by |. "COLOUR car" stands for a caption in each colour that the
    comment "# COLOUR is one of ..." lists.
    """
    colours = re.search(r"^# COLOUR is one of (.*)$", text, re.M)
    captions = []
    for line in text.splitlines():
        for caption in line.split("|") if line[:1] not in "#" else []:
            each = colours[1].split() if "COLOUR" in caption and colours else [""]
            captions += [caption.strip().replace("COLOUR", colour) for colour in each]
    return list(dict.fromkeys(captions))


def plain(prompt):
    """A prompt in lower case without punctuation, leading articles and phrases such as "a picture of"."""
    words = re.sub(r"[\W_]+", " ", prompt.lower())  # keeps the letters of every script, which distinguish prompts
    words = re.sub(r"^ *((an?|the) +)?((picture|drawing|emoji|photo|image|icon) +of +)?((an?|the) +)?", "", words)
    return " ".join(words.split())
