"""Words of texts in any script, for metrics that compare words."""

import re
import unicodedata
from collections.abc import Iterable

# Scripts that write no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese and
# Japanese, with their punctuation and full-width forms.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3000-\u312f\u31a0-\u31bf\u31f0-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)


def beyond_latin(texts: Iterable[str]) -> bool:
    """Tell whether most letters of some texts are of another script than Latin."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    others = [c for c in letters if c >= "\u0370" and not "\u1e00" <= c <= "\u1eff"]
    return 2 * len(others) > len(letters)


def spaced(text: str) -> str:
    """Return a text with each character of a script without spaces as a word of its own."""
    return _WITHOUT_SPACES.sub(r" \g<0> ", text)


class AnyScript:
    """A tokenizer for rouge_score: words are runs of letters, marks and digits of any script."""

    def tokenize(self, text: str) -> list[str]:
        """Return a text's words in lower case, split as ``spaced`` does."""
        kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced(text.lower()))
        return "".join(kept).split()
