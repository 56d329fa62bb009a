// Chats and settings, kept in this browser only.

const SETTINGS = ["system", "which", "buckets", "temperature", "most", "theme", "tools"];

const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("abcli", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Do something with the kept chats; where a browser keeps none (in a private window), nothing. */
async function withChats(mode, use) {
  let database;
  try {
    database = await opened;
  } catch {
    return null;
  }
  return new Promise((resolve, reject) => {
    const request = use(database.transaction("chats", mode).objectStore("chats"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const keepChat = (chat) => withChats("readwrite", (chats) => chats.put(chat));
const forgetChat = (id) => withChats("readwrite", (chats) => chats.delete(id));
const keptChat = (id) => withChats("readonly", (chats) => chats.get(id));
const keptChats = async () => ((await withChats("readonly", (chats) => chats.getAll())) ?? []).sort((a, b) => b.changed - a.changed);

function keepSettings(fields) {
  try {
    localStorage.setItem("abcli", JSON.stringify(Object.fromEntries(SETTINGS.map((name) => [name, fields[name].value]))));
    sessionStorage.setItem("abcli-key", fields.key.value);
  } catch { /* They last as long as the page, then. */ }
}

function restoreSettings(fields) {
  try {
    const kept = JSON.parse(localStorage.getItem("abcli") ?? "{}");
    // The other models are not known yet.
    if (kept.which) fields.which.append(make("option", {}, kept.which));
    for (const name of SETTINGS) if (typeof kept[name] === "string") fields[name].value = kept[name];
    fields.key.value = sessionStorage.getItem("abcli-key") ?? "";
  } catch { /* As they are in the page. */ }
}
