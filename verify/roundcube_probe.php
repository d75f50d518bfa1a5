<?php
// Run on a host of webmail: Roundcube's own classes connect as its pages do, with its own settings.
// Standard input: {"user", "password", "recipient"}; a mail is sent if there is a recipient.
// Prints {"imap" | "sieve" | "smtp": "taken", or what went wrong}.

define('INSTALL_PATH', '/var/lib/roundcube/');
require INSTALL_PATH . 'program/include/clisetup.php';
require '/usr/share/roundcube/plugins/managesieve/lib/Roundcube/rcube_sieve.php';

$order = json_decode(stream_get_contents(STDIN), true);
$config = rcmail::get_instance()->config;
$config->load_from_file('/etc/roundcube/plugins/managesieve/config.inc.php');
$found = [];

[$host, $scheme, $port] = rcube_utils::parse_host_uri($config->get('imap_host'));
$imap = new rcube_imap();
$imap->set_options(['socket_options' => $config->get('imap_conn_options'), 'timeout' => 10]);
$taken = $imap->connect($host, $order['user'], $order['password'], $port, $scheme);
$found['imap'] = $taken ? 'taken' : 'error ' . $imap->get_error_code() . ' ' . $imap->get_error_str();

[$host, $scheme, $port] = rcube_utils::parse_host_uri($config->get('managesieve_host'));
$sieve = new rcube_sieve(
    $order['user'], $order['password'], $host, $port, null, $scheme === 'tls',
    [], false, null, null, $config->get('managesieve_conn_options')
);
$found['sieve'] = $sieve->error() ? 'error ' . $sieve->error() : 'taken';

$smtp = new rcube_smtp();
$found['smtp'] = $smtp->connect() ? 'taken' : json_encode($smtp->get_error());
if ($found['smtp'] === 'taken' && $order['recipient']) {
    $from = $order['sender'];
    $headers = ['From' => $from, 'To' => $order['recipient'], 'Subject' => 'Probe', 'Date' => date('r')];
    $body = "This mail was sent by a check of the mail platform.\r\n";
    $found['sent'] = $smtp->send_mail($from, [$order['recipient']], $headers, $body);
}
echo json_encode($found), "\n";
