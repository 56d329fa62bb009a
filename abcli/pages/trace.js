"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tokens = [...document.querySelectorAll("[data-step]")];
  const detail = document.getElementById("detail");
  const percent = (value) => (100 * value).toFixed(value < 0.01 ? 2 : 1);
  let chosen = -1;

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  // IEEE half precision, little-endian.
  function halves(text) {
    const raw = new DataView(bytes(text).buffer);
    const found = new Float32Array(raw.byteLength / 2);
    for (let i = 0; i < found.length; i++) {
      const bits = raw.getUint16(2 * i, true);
      const power = bits >> 10;
      const part = bits & 1023;
      found[i] = power ? (1 + part / 1024) * 2 ** (power - 15) : part * 2 ** -24;
    }
    return found;
  }
  const places = (text) => new Uint32Array(bytes(text).buffer);

  function make(name, text, className) {
    const found = document.createElement(name);
    if (text !== undefined) found.textContent = text;
    if (className) found.className = className;
    return found;
  }

  function row(body, name, weight, probability, candidates, token) {
    const line = body.appendChild(make("tr"));
    const head = line.appendChild(make("th", name));
    head.scope = "row";
    line.append(make("td", weight), make("td", probability));
    candidates.forEach(([number, text, share]) => {
      const cell = line.appendChild(make("td", undefined, "text"));
      cell.append(make("span", text, number === token ? "token own" : "token"), make("span", " " + percent(share)));
    });
  }

  function show(index) {
    const step = data.steps[index];
    const table = make("table");
    let said = `Token ${index + 1} of ${data.steps.length}, `;
    said += step.agreement === null ? "chosen by one bucket alone" : `agreement ${percent(step.agreement)} %`;
    if (step.differs) said += "; the merged choice is not the native bucket's";
    if (step.token !== step.candidates[0][0]) said += "; drawn, though another token was likelier";
    table.appendChild(make("caption", said));
    const head = table.appendChild(make("thead")).appendChild(make("tr"));
    ["bucket", "weight", "this token, %", "alone it would say, %", "", "", "", ""].forEach((text) => {
      const cell = head.appendChild(make(text ? "th" : "td", text, text.startsWith("alone") ? "text" : ""));
      if (text) cell.scope = "col";
    });
    const body = table.appendChild(make("tbody"));
    step.views.forEach((view) => {
      row(body, data.names[view.bucket], view.weight.toFixed(4), percent(view.probability), view.candidates, step.token);
    });
    row(body, "merged", "", percent(step.probability), step.candidates, step.token);
    const scroll = make("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "What every bucket said, as a table");
    scroll.appendChild(table);
    detail.replaceChildren(scroll);
  }

  const attention = data.attention && {
    ...data.attention,
    whole: halves(data.attention.whole),
    passages: halves(data.attention.passages),
    strongest: places(data.attention.strongest),
    weights: halves(data.attention.weights),
  };
  const picked = (name) => document.querySelector(`input[name=${name}]:checked`).value;
  const level = (share, most) => Math.min(9, Math.ceil(9 * Math.sqrt(share / (most || 1))));

  function shade() {
    if (!attention) return;
    const {rows, tokens: count, spans, steps, kept} = attention;
    const own = picked("of") === "step" && chosen >= 0 && chosen < steps;
    const row = Number(picked("row"));
    const shares = new Float32Array(count);
    let most = 0;
    if (own) {
      const from = (chosen * rows + row) * kept;
      for (let i = 0; i < kept; i++) shares[attention.strongest[from + i]] = attention.weights[from + i];
    } else {
      shares.set(attention.whole.subarray(row * count, (row + 1) * count));
    }
    for (let i = 1; i < count; i++) most = Math.max(most, shares[i]);
    const sums = (line, bucket) => {
      if (own) return attention.passages[(chosen * rows + bucket) * spans.length + line];
      let total = 0;
      for (let i = spans[line][0]; i < spans[line][1]; i++) total += attention.whole[bucket * count + i];
      return total;
    };
    let largest = 0;
    const table = spans.map((_span, line) => {
      const found = [];
      for (let bucket = 0; bucket < rows; bucket++) found.push(sums(line, bucket));
      // The first token is where heads rest that look at nothing.
      if (line > 0) largest = Math.max(largest, ...found);
      return found;
    });
    document.querySelectorAll("#passages tbody tr").forEach((line, index) => {
      const [text, ...cells] = line.children;
      [...text.children].forEach((token, offset) => {
        const place = spans[index][0] + offset;
        token.className = "s" + (place ? level(shares[place], most) : 0);
      });
      const native = table[index][data.native];
      cells.forEach((cell, bucket) => {
        const share = table[index][bucket];
        cell.className = "s" + level(share, largest);
        const more = share >= 1.5 * native && share >= 0.01;
        const less = share <= native / 1.5 && native >= 0.01;
        cell.textContent = (more ? "▲ " : less ? "▼ " : "") + percent(share);
      });
    });
    const of = own ? `of token ${chosen + 1}` : "of the whole answer";
    document.getElementById("passages-caption").textContent = `Percent of the attention that each passage gets, ${of}`;
  }

  function choose(index) {
    tokens.forEach((token, at) => token.setAttribute("aria-pressed", String(at === index)));
    chosen = index;
    show(index);
    const of = document.querySelector("input[name=of][value=step]");
    if (of) of.checked = true;
    shade();
  }

  tokens.forEach((token, index) => {
    token.addEventListener("mouseenter", () => show(index));
    token.addEventListener("mouseleave", () => chosen >= 0 && show(chosen));
    token.addEventListener("focus", () => {
      tokens.forEach((other) => { other.tabIndex = -1; });
      token.tabIndex = 0;
      show(index);
    });
    token.addEventListener("click", () => choose(index));
    token.addEventListener("keydown", (event) => {
      const to = {ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: tokens.length - 1}[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      tokens[to].focus();
    });
  });
  document.querySelectorAll("input[type=radio]").forEach((input) => input.addEventListener("change", shade));
})();
