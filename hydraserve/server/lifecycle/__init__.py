"""The life of adapters: who has a name and a content (`service`, `contents`), where contents come from (`origins`,
`reader`, `directory`), and who may be in the engine when (`admission`, `turnstile`, `host_cache`, `pins`)."""
