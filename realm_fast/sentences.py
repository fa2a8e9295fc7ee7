"""Where sentences end: one pass of a regular expression and a few rules about abbreviations.

Blocks are cut at sentence ends and a salient span never crosses one, so a wrong cut costs more than a
missed one: after an abbreviation, an initial or an acronym the text is cut only before a word that
usually begins a sentence. Rules, not a model: 20 MB/s or so of text on one core, no download, the
same answer everywhere. See docs/data.md for a comparison with pysbd and spaCy.
"""

import re

# A run of terminators, closing quotes and brackets, then white space; or CJK terminators, which need none.
# Possessive throughout: a hundred thousand dots in a row cost no more than as many letters.
_CANDIDATE = re.compile(
    r"""(?<![.!?…])(?P<stop>[.!?…]++)(?P<close>['"’”»)\]]*+)(?:\[\d++\])*+\s++"""
    r"""|[。！？]++[」』”’）]*+\s*+"""
    r"""|\n[^\S\n]*+\n\s*+"""
)
_LAST_WORD = re.compile(r"[^\s(\[\"“‘«—–/]*$")
_NEXT_WORD = re.compile(r"""[('"“‘«\[¿¡—–-]*\s*(\w+)""")
_ACRONYM = re.compile(r"^(?:\w\.)+\w$|^\w(?:-\w)*$")  # before the final stop: "U.S", "J", "J.R.R", "J.-C"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never end a sentence: a name follows.
_BEFORE_NAME = _words(
    """
    mr mrs ms messrs dr prof rev fr hon pres gov gen col lt capt cpt cmdr cdr adm maj sgt cpl pvt brig sen
    rep supt st ste mt ft sr sra srta dña mme mlle mgr msgr amb atty approx est vs viz née e.g i.e eg ie
    aka a.k.a lit pron esp incl excl eds trans transl ca cf al
    """
)
# Do not end a sentence before a number: "No. 5", "Op. 71", "Jan. 3", "c. 1479".
_BEFORE_NUMBER = _words(
    """
    no nos nr núm num vol vols fig figs eq eqs ch chap sec art op cat pp pg fl art spec ed v circa
    jan feb mar apr jun jul aug sep sept oct nov dec av
    """
)
# May end a sentence: cut only if the next word is a usual beginning.
_EITHER = _words(
    """
    inc ltd co corp bros llc plc jr sr esq phd ph.d m.d b.a m.a b.s m.s etc u.s u.k u.n e.u d.c a.m p.m am pm
    b.c a.d b.c.e c.e ave blvd rd dept univ assn est ext ariz calif colo conn del fla ill ind kan ky mass md
    mich minn miss mo mont neb nev okla ore pa penn tenn tex va vt wash wis wyo
    """
)
_USUAL_BEGINNING = _words(
    """
    The A An He She It They We I You This That These Those There Here His Her Its Their Our My Your
    In On At From By For With Without After Before During Since Until While When Where As If Although Though
    However Because But And Or So Yet Both Each Some Many Most Several Such Other Another All No Not One Two
    Under Over Between Among Within Through Despite Following According Today Later Then Also Once Its
    What Who Why How Is Are Was Were Did Does Do
    El La Los Las Un Una En Su Sus Se Es Fue Con Por Tras Le Les Il Elle Ils Elles Ce Cette Ces Son Sa
    Ses Dans Des Du
    """
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order, each with single spaces; their words are the text's words.

    A blank line always ends a sentence, a single line break is a space.
    """
    sentences: list[str] = []
    start = 0
    for match in _CANDIDATE.finditer(text):
        stop = match.end()
        if stop < len(text) and match["stop"] and not _ends(text, start, match):
            continue
        if sentence := " ".join(text[start:stop].split()):
            sentences.append(sentence)
        start = stop
    if sentence := " ".join(text[start:].split()):
        sentences.append(sentence)
    return sentences


def _ends(text: str, start: int, match: re.Match) -> bool:
    following = _NEXT_WORD.match(text, match.end())
    if following is None:  # a symbol or the end follows
        return True
    word = following[1]
    if word[0].islower():
        # "Yahoo! is", "What? said he", "approx. half": only a clear stop ends before a small letter
        return False
    if match["stop"] != "." or match["close"]:
        return match["stop"] != "..." or word in _USUAL_BEGINNING
    last = _LAST_WORD.search(text, max(start, match.start() - 40), match.start())
    before = last[0] if last else ""
    lower = before.lower()
    if lower in _BEFORE_NAME:
        return False
    acronym = lower in _EITHER or (_ACRONYM.match(before) and not before.isdigit())
    if word[0].isdigit():
        return not (acronym or lower in _BEFORE_NUMBER)
    if acronym:
        initial = len(word) == 1 and text[following.end() : following.end() + 1] == "."  # "P. I. Tchaikovsky"
        return word in _USUAL_BEGINNING and not initial
    return True
