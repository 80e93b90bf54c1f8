// Detection of an answer that repeats itself without end.

const MAX_UNIT = 500;
const MIN_CHARS = 600;
const MIN_TIMES = 6;

// Length of the text that the end of `text` repeats over and over, or 0.
export function repeatedUnit(text) {
  const end = text.length - 1;
  const size = Math.min(text.length, MAX_UNIT * MIN_TIMES);
  // borders[i]: longest proper border of the last i + 1 characters, read backwards (Knuth, Morris, Pratt)
  const borders = new Uint16Array(size);
  for (let i = 1, border = 0; i < size; i++) {
    while (border && text[end - i] !== text[end - border]) border = borders[border - 1];
    if (text[end - i] === text[end - border]) border++;
    borders[i] = border;
    const unit = i + 1 - border;
    if (unit <= MAX_UNIT && i + 1 >= Math.max(MIN_CHARS, MIN_TIMES * unit)) return unit;
  }
  return 0;
}
