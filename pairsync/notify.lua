-- Dovecot's push notification: leave a marker for a user whose mailbox changed.
-- Runs in Dovecot's mail processes, before the client gets its answer. A marker is an empty file
-- named after the user. It is opened to append and nothing is written: its time stays that of
-- the first change, it takes no space, and closing it wakes the daemon each time.
-- A disk that takes no new file must not keep mail out: then the marker goes to /run.
-- A change of subscriptions leaves one more before it, with ~ in front, and mails that a user
-- deletes or moves away leave their UIDs: see markers.py.

local places = { "/var/lib/pairsync/", "/run/pairsync/" }

local function file_name(user)
  local name = user:gsub("[^%w@_+=.-]", function(c) return string.format("%%%02X", c:byte()) end)
  return (name:gsub("^%.", "%%2E"))
end

-- Append to the first of the files that can be opened. Returns why it was none of them.
local function append(folder, name, text)
  local said = nil
  for _, place in ipairs(places) do
    local file, problem = io.open(place .. folder .. "/" .. name, "a")
    if file then
      file:write(text)
      file:close()
      return nil
    end
    said = said or problem
  end
  return said
end

local function leave(user, prefix)
  local problem = append("dirty", prefix .. file_name(user.username), "")
  if problem then
    dovecot.i_warning("pairsync: cannot mark " .. user.username .. " as changed: " .. problem)
  end
end

function dovecot_lua_notify_begin_txn(user)
  return { user = user, expunged = {} }
end

function dovecot_lua_notify_end_txn(context, success)
  if #context.expunged > 0 then
    append("expunged", file_name(context.user.username), table.concat(context.expunged))
  end
  leave(context.user, "")
end

-- Dovecot tells of those changes only for which there is a function.
local function noted(context, event) end
local function subscribed(context, event)
  leave(context.user, "~")
end
local function expunged(context, event)
  table.insert(context.expunged, string.format("%d %d\n", event.uid_validity, event.uid))
end

dovecot_lua_notify_event_message_new = noted
dovecot_lua_notify_event_message_append = noted
dovecot_lua_notify_event_message_expunge = expunged
dovecot_lua_notify_event_message_read = noted
dovecot_lua_notify_event_message_trash = noted
dovecot_lua_notify_event_flags_set = noted
dovecot_lua_notify_event_flags_clear = noted
dovecot_lua_notify_event_mailbox_create = noted
dovecot_lua_notify_event_mailbox_delete = noted
dovecot_lua_notify_event_mailbox_rename = noted
dovecot_lua_notify_event_mailbox_subscribe = subscribed
dovecot_lua_notify_event_mailbox_unsubscribe = subscribed
