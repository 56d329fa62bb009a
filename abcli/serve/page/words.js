// The words of an answer, shaded by how far the buckets agree, and the view of what each bucket would have said.

/** An element with properties and children; text is never read as markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const percent = (share) => `${Math.round(share * 100)} %`;
const agreementOf = (tokens) => Math.min(1, ...tokens.map((token) => token.agreement ?? 1));
const shownToken = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";

/** A token of a stream as it is kept: text, probability, agreement, and each bucket's weight and likeliest tokens. */
function keptToken(token) {
  const likely = (items) => items.map((item) => [item.token, Math.exp(item.logprob)]);
  return {
    text: token.token,
    probability: Math.exp(token.logprob),
    agreement: token.agreement ?? null,
    merged: likely(token.top_logprobs),
    buckets: (token.buckets ?? []).map((bucket) => [bucket.weight, likely(bucket.top_logprobs)]),
  };
}

/** The pieces of an answer as words: what begins with white space begins a word. */
function addToWords(words, text, tokens) {
  const last = words.at(-1);
  if (last && !/^\s/.test(text)) {
    last.text += text;
    last.tokens.push(...tokens);
    return last;
  }
  words.push({ text, tokens: [...tokens] });
  return words.at(-1);
}

/** The element of a word, behind its white space. */
function wordElement(word) {
  return [word.text.match(/^\s*/)[0], make("span", { className: "word" })];
}

function showWord(element, word) {
  element.textContent = word.text.trimStart();
  const agreement = agreementOf(word.tokens);
  // Where the buckets share half of the probability the shade is full.
  element.style.setProperty("--doubt", Math.min(1, 2 * (1 - agreement)).toFixed(3));
  element.classList.toggle("split", agreement < 0.5);
  if (word.tokens.length) element.title = `buckets agree ${percent(agreement)}`;
}

/** A table of what each bucket found likeliest where a token was chosen. */
function tokenTable(token, bases) {
  const row = (name, likely) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, ...likely.map(([text, probability]) => {
    const line = make("div", { className: text === token.text ? "same" : "" }, make("code", {}, shownToken(text)), make("span", {}, percent(probability)));
    line.style.setProperty("--share", probability);
    return line;
  })));
  const agreement = token.agreement === null ? "one bucket decided alone" : `buckets agree ${percent(token.agreement)}`;
  const caption = make("caption", {}, make("q", {}, shownToken(token.text)), ` ${percent(token.probability)}; ${agreement}`);
  const names = token.buckets.map(([weight], number) => {
    const base = bases[token.buckets.length === 1 ? -1 : number];
    return `${base === undefined ? "native" : Math.round(base).toLocaleString("en")} (${percent(weight)})`;
  });
  return make("table", {}, caption, make("tbody", {}, row("together", token.merged), ...token.buckets.map(([, likely], number) => row(names[number], likely))));
}
