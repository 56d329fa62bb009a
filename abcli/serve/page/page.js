// The chat itself.

const MOST_FILE_BYTES = 512 * 1024;
const by = (id) => document.getElementById(id);
const fields = Object.fromEntries([...SETTINGS, "key"].map((name) => [name, by(name)]));
const state = { chat: null, models: [], model: null, running: null, files: [], chosen: null };

const newChat = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "New chat", changed: Date.now(), messages: [] });

function complain(error) {
  by("problem").textContent = error ? String(error.message ?? error) : "";
  by("problem").hidden = !error;
  if (error?.locked) {
    showSettings(true);
    fields.key.focus();
  }
}

function showSettings(shown) {
  by("settings").hidden = !shown;
  by("settings-toggle").setAttribute("aria-expanded", shown);
}

function showChats(shown) {
  by("chats").classList.toggle("shown", shown);
  by("chats-toggle").setAttribute("aria-expanded", shown);
}

function applyTheme() {
  if (fields.theme.value) document.documentElement.dataset.theme = fields.theme.value;
  else delete document.documentElement.dataset.theme;
}

async function readModels() {
  try {
    const { data } = await (await ask("/v1/models", { key: fields.key.value })).json();
    // One that is loaded and has no buckets writes nothing.
    state.models = data.filter((model) => model.abcli || model.status.value !== "loaded");
    const before = by("which").value;
    by("which").replaceChildren(...state.models.map((model) => make("option", { value: model.id, selected: model.id === before }, model.id)));
    by("which").parentElement.hidden = state.models.length < 2;
    showModel();
  } catch (error) {
    complain(error);
  }
}

function showModel() {
  state.model = state.models.find((model) => model.id === by("which").value) ?? null;
  const count = state.model?.abcli?.bases.length;
  const buckets = count ? ` · ${count === 1 ? "one bucket" : `${count} buckets`}` : "";
  by("model").textContent = `${state.model?.id ?? "no model that writes"}${buckets}`;
}

// --- what is shown

function showMessages() {
  by("messages").replaceChildren(...state.chat.messages.map(messageElement));
  closeView();
  by("messages").scrollTop = by("messages").scrollHeight;
}

function messageElement(message, number) {
  const names = { user: "You", assistant: state.model?.id ?? "Model", tool: `Result of ${message.name}` };
  const element = make("article", { className: `message ${message.role}` }, make("h2", {}, names[message.role]));
  if (message.role !== "assistant") {
    element.append(make("div", { className: "body" }, message.content));
    return element;
  }
  const parts = answerParts(message);
  element.append(...parts.all);
  parts.show();
  if (message !== state.running?.message) element.append(actions(message, number));
  return element;
}

/** The elements of an answer, and what updates them while it comes. */
function answerParts(message) {
  const thought = make("div");
  const summary = make("summary", {}, "Thought");
  const folded = make("details", { hidden: true }, summary, thought);
  const help = "Answer. Left and right choose a word, Enter shows what each bucket would have said.";
  const body = make("div", { className: "body", tabIndex: 0, role: "group", "aria-label": help });
  const calls = make("div");
  body.addEventListener("click", (event) => event.target.classList.contains("word") && chooseWord(message, body, [...body.children].indexOf(event.target), true));
  body.addEventListener("keydown", (event) => moveInWords(event, message, body));
  const show = () => {
    folded.hidden = !message.thought;
    thought.textContent = message.thought;
    summary.textContent = message.words.length || message.calls.length || message !== state.running?.message ? "Thought" : "Thinking…";
    // Only the last word may have changed since.
    for (let at = Math.max(0, body.children.length - 1); at < message.words.length; at += 1) {
      if (!body.children[at]) body.append(...wordElement(message.words[at]));
      showWord(body.children[at], message.words[at]);
    }
    body.hidden = !message.words.length;
    calls.replaceChildren(...message.calls.map((call) => callElement(message, call)));
  };
  return { all: [folded, body, calls], show };
}

function callElement(message, call) {
  const element = make("div", { className: "call" }, make("strong", {}, call.name), " ", make("code", {}, call.arguments));
  const answered = state.chat.messages.some((other) => other.role === "tool" && other.call === call.id);
  if (message === state.running?.message || answered) return element;
  const result = make("textarea", { rows: 2, "aria-label": `Result of ${call.name}` });
  const form = make("form", {}, result, make("button", { type: "submit" }, "Give this result"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    giveResult(call, result.value);
  });
  element.append(form);
  return element;
}

function actions(message, number) {
  const copy = make("button", { type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(message.words.map((word) => word.text).join(""));
    by("announcer").textContent = "copied";
  });
  const row = make("div", { className: "actions" }, copy);
  if (number === state.chat.messages.length - 1) {
    const again = make("button", { type: "button" }, "Again");
    again.addEventListener("click", () => {
      if (state.running) return;
      state.chat.messages.pop();
      answer();
    });
    row.append(again);
  }
  return row;
}

async function showChatList() {
  const items = (await keptChats()).map((chat) => {
    const open = make("button", { type: "button", className: "open", "aria-current": String(chat.id === state.chat.id) }, chat.title);
    open.addEventListener("click", () => openChat(chat.id));
    const forget = make("button", { type: "button", "aria-label": `Delete ${chat.title}` }, "×");
    forget.addEventListener("click", async () => {
      await forgetChat(chat.id);
      if (chat.id === state.chat.id) startChat();
      else showChatList();
    });
    return make("li", {}, open, forget);
  });
  by("chat-list").replaceChildren(...items);
}

// --- a word's buckets

function chooseWord(message, body, number, shown) {
  const word = message.words[number];
  if (!word) return;
  document.querySelector(".word.chosen")?.classList.remove("chosen");
  body.children[number].classList.add("chosen");
  state.chosen = { body, number };
  if (!shown) return;
  const bases = message.bases ?? state.model?.abcli?.bases ?? [];
  const tables = word.tokens.map((token) => tokenTable(token, bases));
  by("view-body").replaceChildren(...(tables.length ? tables : ["Nothing was kept of this word."]));
  by("view").hidden = false;
}

function moveInWords(event, message, body) {
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  const at = state.chosen?.body === body ? state.chosen.number : -1;
  if (!(event.key in steps || event.key === "Enter") || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const step = steps[event.key] ?? 0;
  let wanted = Math.max(at + step, 0);
  while (step && message.words[wanted]?.text.trim() === "") wanted += step;
  if (!message.words[wanted]) return;
  chooseWord(message, body, wanted, event.key === "Enter" || !by("view").hidden);
  by("announcer").textContent = `${message.words[wanted].text.trim()}, ${body.children[wanted].title}`;
}

function closeView() {
  by("view").hidden = true;
  document.querySelector(".word.chosen")?.classList.remove("chosen");
  state.chosen?.body.focus();
  state.chosen = null;
}

// --- asking

function request(messages) {
  const asked = {
    model: state.model?.id ?? "",
    messages,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
    abcli: { show_buckets: true, ...(fields.buckets.value === "1" ? { buckets: 1 } : {}) },
  };
  if (fields.temperature.value) asked.temperature = Number(fields.temperature.value);
  if (fields.most.value) asked.max_completion_tokens = Number(fields.most.value);
  if (fields.tools.value.trim()) asked.tools = JSON.parse(fields.tools.value);
  return asked;
}

function wireMessages() {
  const system = fields.system.value.trim() ? [{ role: "system", content: fields.system.value }] : [];
  return [...system, ...state.chat.messages.map((message) => {
    if (message.role === "tool") return { role: "tool", tool_call_id: message.call, content: message.content };
    if (message.role === "user") return { role: "user", content: message.content };
    const calls = message.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    return { role: "assistant", content: message.words.map((word) => word.text).join(""), ...(calls.length ? { tool_calls: calls } : {}) };
  })];
}

function take(message, chunk) {
  message.bases = chunk.abcli?.bases ?? message.bases;
  message.agreement = chunk.abcli?.agreement ?? message.agreement;
  const choice = chunk.choices[0];
  if (!choice) {
    const { prompt_tokens: prompt, completion_tokens: completion } = chunk.usage;
    const speed = chunk.timings?.predicted_per_second;
    const agreement = message.agreement === null || (message.bases ?? []).length < 2 ? "" : `, buckets agree ${percent(message.agreement)}`;
    by("numbers").textContent = `${prompt} + ${completion} tokens${speed ? `, ${speed.toFixed(1)} a second` : ""}${agreement}`;
    return;
  }
  const { delta } = choice;
  message.thought += delta.reasoning_content ?? "";
  if (delta.content) addToWords(message.words, delta.content, (choice.logprobs?.content ?? []).map(keptToken));
  for (const part of delta.tool_calls ?? []) {
    message.calls[part.index] ??= { id: part.id, name: part.function.name, arguments: "" };
    message.calls[part.index].arguments += part.function.arguments ?? "";
  }
  if (choice.finish_reason === "length") complain("the answer was cut: its limit of tokens or the context is reached");
}

async function answer() {
  const { chat } = state;
  complain(null);
  let asked;
  try {
    asked = request(wireMessages());
  } catch (error) {
    complain(`the tools are not JSON: ${error.message}`);
    return;
  }
  const message = { role: "assistant", thought: "", words: [], calls: [], bases: null, agreement: null };
  const running = { message, abort: new AbortController() };
  state.running = running;
  chat.messages.push(message);
  showMessages();
  busy(true);
  try {
    const element = by("messages").lastElementChild;
    const parts = answerParts(message);
    element.replaceChildren(element.firstElementChild, ...parts.all);
    const response = await ask("/v1/chat/completions", { body: asked, key: fields.key.value, signal: running.abort.signal });
    for await (const chunk of eventsOf(response)) {
      take(message, chunk);
      if (state.chat !== chat) continue;
      const box = by("messages");
      const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
      parts.show();
      if (follows) box.scrollTop = box.scrollHeight;
    }
    by("announcer").textContent = "the answer is complete";
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
  state.running = null;
  if (!message.words.length && !message.calls.length && !message.thought) chat.messages.pop();
  busy(false);
  // It may have been loaded just now.
  if (!state.model?.abcli) await readModels();
  await keep(chat);
  if (state.chat === chat) showMessages();
}

function busy(running) {
  by("stop").hidden = !running;
  by("send").hidden = running;
}

async function keep(chat) {
  chat.changed = Date.now();
  await keepChat(chat).catch(complain);
  await showChatList();
}

function send() {
  const said = by("text").value.trim();
  if (state.running || !(said || state.files.length)) return;
  const parts = state.files.map((file) => `${file.name}:\n\`\`\`\n${file.text}\n\`\`\``);
  if (!state.chat.messages.length) state.chat.title = (said || state.files[0].name).slice(0, 60);
  state.chat.messages.push({ role: "user", content: [...parts, said].filter(Boolean).join("\n\n") });
  by("text").value = "";
  state.files = [];
  showFiles();
  answer();
}

function giveResult(call, text) {
  if (state.running) return;
  state.chat.messages.push({ role: "tool", call: call.id, name: call.name, content: text });
  const calls = state.chat.messages.findLast((message) => message.role === "assistant").calls;
  const missing = calls.some((other) => !state.chat.messages.some((message) => message.call === other.id));
  if (missing) showMessages();
  else answer();
}

// --- files

async function addFiles(list) {
  complain(null);
  for (const file of list) {
    if (file.size > MOST_FILE_BYTES) {
      complain(`${file.name} is larger than ${MOST_FILE_BYTES / 1024} KiB`);
      continue;
    }
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (text.includes("\0")) throw new TypeError();
      state.files.push({ name: file.name, text });
    } catch {
      complain(`${file.name} is not text`);
    }
  }
  showFiles();
}

function showFiles() {
  by("attached").replaceChildren(...state.files.map((file) => {
    const drop = make("button", { type: "button", "aria-label": `Remove ${file.name}` }, "×");
    drop.addEventListener("click", () => {
      state.files = state.files.filter((other) => other !== file);
      showFiles();
    });
    return make("li", {}, file.name, drop);
  }));
  by("attached").hidden = !state.files.length;
}

// --- chats

function startChat() {
  state.running?.abort.abort();
  state.chat = newChat();
  by("numbers").textContent = "";
  showMessages();
  showChatList();
  showChats(false);
  by("text").focus();
}

async function openChat(id) {
  state.running?.abort.abort();
  state.chat = (await keptChat(id)) ?? newChat();
  showMessages();
  showChatList();
  showChats(false);
}

by("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
by("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
by("stop").addEventListener("click", () => state.running?.abort.abort());
by("attach").addEventListener("click", () => by("files").click());
by("files").addEventListener("change", async (event) => { await addFiles([...event.target.files]); event.target.value = ""; });
by("new-chat").addEventListener("click", startChat);
by("view-close").addEventListener("click", closeView);
by("chats-toggle").addEventListener("click", () => showChats(!by("chats").classList.contains("shown")));
by("settings-toggle").addEventListener("click", () => showSettings(by("settings").hidden));
by("shading").addEventListener("click", () => {
  by("shading").setAttribute("aria-pressed", by("messages").classList.toggle("shaded"));
});
by("settings").addEventListener("submit", (event) => event.preventDefault());
by("settings").addEventListener("change", (event) => {
  keepSettings(fields);
  applyTheme();
  if (event.target === by("which")) showModel();
  if (event.target !== fields.key) return;
  complain(null);
  readModels();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.running) state.running.abort.abort();
  else if (!by("view").hidden) closeView();
  else showChats(false);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    by("composer").classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") addFiles([...event.dataTransfer.files]);
  });
}

restoreSettings(fields);
applyTheme();
showFiles();
by("messages").classList.add("shaded");
startChat();
readModels();
