-- Dovecot's push notification: leave a marker for a user whose mailbox changed.
-- Runs in Dovecot's mail processes, before the client gets its answer. A marker is an empty file
-- named after the user. It is opened to append and nothing is written: its time stays that of
-- the first change, it takes no space, and closing it wakes the daemon each time.
-- A disk that takes no new file must not keep mail out: then the marker goes to /run.
-- A change of subscriptions leaves one more before it, with ~ in front: see markers.py. A new
-- folder, a rename and a deletion leave one with ! in front, which has the old name and the new one
-- in it, a line each, where there are both: see told.py.

local folders = { "/var/lib/pairsync/dirty/", "/run/pairsync/dirty/" }

local function file_name(user)
  local name = user:gsub("[^%w@_+=.-]", function(c) return string.format("%%%02X", c:byte()) end)
  return (name:gsub("^%.", "%%2E"))
end

local function leave(user, name, content)
  local said
  for _, folder in ipairs(folders) do
    local file, problem = io.open(folder .. name, "a")
    if file then
      file:write(content)
      file:close()
      return
    end
    said = said or problem
  end
  dovecot.i_warning("pairsync: cannot mark " .. user.username .. " as changed: " .. said)
end

function dovecot_lua_notify_begin_txn(user)
  return user
end

function dovecot_lua_notify_end_txn(user, success)
  leave(user, file_name(user.username), "")
end

-- Dovecot tells of those changes only for which there is a function.
local function noted(user, event) end
local function subscribed(user, event)
  leave(user, "~" .. file_name(user.username), "")
end
local function named(user, event)
  -- No other process has used so much time at this time, and this one names no two folders then.
  local name = string.format("!%s!%d.%.6f", file_name(user.username), os.time(), os.clock())
  leave(user, name, (event.mailbox_old or "") .. "\n" .. event.mailbox .. "\n")
end
local function deleted(user, event)
  named(user, { mailbox_old = event.mailbox, mailbox = "" })
end

dovecot_lua_notify_event_message_new = noted
dovecot_lua_notify_event_message_append = noted
dovecot_lua_notify_event_message_expunge = noted
dovecot_lua_notify_event_message_read = noted
dovecot_lua_notify_event_message_trash = noted
dovecot_lua_notify_event_flags_set = noted
dovecot_lua_notify_event_flags_clear = noted
dovecot_lua_notify_event_mailbox_create = named
dovecot_lua_notify_event_mailbox_delete = deleted
dovecot_lua_notify_event_mailbox_rename = named
dovecot_lua_notify_event_mailbox_subscribe = subscribed
dovecot_lua_notify_event_mailbox_unsubscribe = subscribed
